"""What the explanation measures, on problems where the answers are known."""

import json
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("sklearn")

from benchmarks.quality import plan as planning
from benchmarks.quality.config import StudyError
from benchmarks.quality.place import Place
from benchmarks.quality.probe import Probe, curvature, gaps, gradients, own_rates
from benchmarks.quality.why import at_equal_loss, middle, why
from lightning_sop import MajorityKernels, SimulatedOverparam
from tests.test_quality import fake, random_state, study  # noqa: F401
from tests.test_quality_methods import trainer


class Regression(LightningModule):
    """Linear regression: the Hessian by the weight is that of the inputs alone."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False).double()
        self.make = lambda: optimizer(self.parameters(), **options)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return square(self, batch)

    def configure_optimizers(self):
        return self.make()


def square(network, batch):
    return 0.5 * (network(batch[0]) - batch[1]).square().sum(1).mean()


def batches(count=4):
    torch.manual_seed(3)
    return [(torch.randn(8, 3).double(), torch.randn(8, 2).double()) for _ in range(count)]


def test_gradient_and_curvature_of_a_quadratic():
    module, data = Regression(), batches()
    weights = [module.layer.weight]
    found = gradients(module, weights, data, square)
    each = [(module(x) - y).detach().T @ x / 8 for x, y in data]
    assert found["gradient"] == pytest.approx(float(torch.stack(each).mean(0).square().sum()))
    assert found["batch_gradient"] == pytest.approx(sum(float(g.square().sum()) for g in each) / 4)
    hessian = sum(x.T @ x / 8 for x, _ in data) / 4
    directions = [[torch.randn(2, 3).double()] for _ in range(3)]
    expected = [0.5 * float((d @ hessian * d).sum()) for (d,) in directions]
    before = module.layer.weight.detach().clone()
    assert curvature(module, weights, data, square, directions) == pytest.approx(expected)
    assert gaps(module, weights, data, square, directions) == pytest.approx(expected)
    assert torch.equal(module.layer.weight, before)


def test_a_probe_measures_the_covariance_of_the_mixes():
    torch.manual_seed(0)
    module, data, rate = Regression(lr=0.01), batches(), 0.01
    probe = Probe(data, probes=1, draws=2000, loss=square)
    ours = SimulatedOverparam(MajorityKernels(4, draw="dirichlet", init="independent", anneal=0.0), verbose=False)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    trainer(ours, probe).fit(module, DataLoader(TensorDataset(x, y), 8))
    (row,) = probe.rows
    (form,) = ours.engine.forms.values()
    kernels = torch.stack([phi.detach() for phi in form.phi])
    spread = kernels - kernels.mean(0)
    hessian = x.T @ x / len(x)
    # Cov v = (1 - 11ᵀ/k) / (k (k + 1))
    expected = sum(0.5 * float((d @ hessian * d).sum()) for d in spread) / 20
    assert row["curvature"] == pytest.approx(expected, rel=0.06)
    assert abs(row["curvature"] - expected) < 4 * row["curvature_error"]
    assert row["gap"] == pytest.approx(row["curvature"])
    assert row["amplification"] == pytest.approx(1.6, rel=0.01)
    mean = kernels.mean(0)
    each = [((x @ mean.T - y).T @ x / 8) for x, y in data]
    batch = sum(float(g.square().sum()) for g in each) / 4
    assert row["batch_gradient"] == pytest.approx(batch)
    assert row["predicted"] == pytest.approx(rate / 4 * (row["amplification"] - 1) * batch)
    assert row["predicted_own_rates"] == pytest.approx(row["predicted"])


def test_a_probe_has_its_batches_statistics_and_leaves_the_run_s_alone():
    """Running statistics lag: a network that is measured with them seems to have larger gradients than it has."""
    data = [tuple(part.float() for part in batch) for batch in batches()]
    loader = DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*data, strict=True))), 8)

    def run(*callbacks):
        torch.manual_seed(0)
        module = Regression(lr=0.5)
        module.layer = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
        trainer(*callbacks).fit(module, loader)
        return module.eval(), torch.get_rng_state()

    probe = Probe(data, probes=1, loss=square)
    (module, state), (plain, expected) = run(probe), run()
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert torch.equal(state, expected)
    first, norm, _, last = module.layer
    hidden = [first(x).detach() for x, _ in data]
    norm.running_mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
    norm.running_var = torch.stack([h.var(0) for h in hidden]).mean(0)
    found = gradients(module, [first.weight, last.weight], data, square)
    assert probe.rows[0]["batch_gradient"] == pytest.approx(found["batch_gradient"], rel=1e-4)
    assert probe.rows[0]["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_the_prediction_is_the_steady_state_of_sgd():
    """Noise of the batches and a quadratic: ½ tr(HC) comes to (h/4)(A - 1) E‖g‖² (papers' 1.3, 3. and 4.)."""
    torch.manual_seed(0)
    h, k, hessian = 0.02, 4, torch.diag(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    runs = 400
    kernels = torch.zeros(runs, k, 3, dtype=torch.float64)
    method = MajorityKernels(k, draw="dirichlet")
    generator = torch.Generator().manual_seed(0)
    measured, squares = [], []
    for step in range(1500):
        mean = kernels.mean(1)
        noise = torch.randn(runs, 3, dtype=torch.float64)
        if step >= 700 and step % 20 == 0:
            spread = kernels - mean[:, None]
            measured.append(0.5 * float(torch.einsum("rki,ij,rkj->r", spread, hessian, spread).mean()) / 20)
            squares.append(float((mean @ hessian + noise).square().sum(1).mean()))
        mix = method._simplex(runs, generator).T.double()
        gradient = torch.einsum("rk,rki->ri", mix, kernels) @ hessian + noise
        kernels = kernels - h * k * mix[..., None] * gradient[:, None]
    predicted = h / 4 * 0.6 * sum(squares) / len(squares)
    assert sum(measured) / len(measured) == pytest.approx(predicted, rel=0.1)


def test_rates_of_the_optimizers():
    module = Regression()
    weight = module.layer.weight
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    assert torch.allclose(own_rates(sgd, weight), torch.full_like(weight, 0.2))
    adam = torch.optim.Adam([weight], lr=0.1)
    weight.grad = torch.full_like(weight, 0.3)
    adam.step()
    assert torch.allclose(own_rates(adam, weight), torch.full_like(weight, 0.1 / 0.3), rtol=1e-5)


def test_a_study_explains_itself(study, tmp_path, monkeypatch):  # noqa: F811
    study = replace(study, trials=1)
    task, results = study.tasks["tiny"], {}
    for variant in study.variants.values():
        for run in planning.trials(study, task, variant):
            results[run.key] = fake(run, 0.5)

    def write():
        return why(study, results, Place(None, str(tmp_path), "cpu"), tmp_path, "the command")

    data, picture, page = write()
    found = json.loads(data.read_text())["rows"]
    assert [row["epoch"] for row in found["plain"]["measured"]] == [1, 2]
    first, last = found["majority_kernels"]["measured"]
    assert first["predicted"] > 0 < first["gradient"]
    assert last["rate"] == pytest.approx(0, abs=1e-12)  # the cosine has ended
    assert picture.stat().st_size > 10_000
    assert "`the command`" in page.read_text()
    assert "| Majority Kernels | " in page.read_text()
    # what was measured is not measured again
    monkeypatch.setattr("benchmarks.quality.why.follow", lambda run, place: pytest.fail("trained again"))
    before = page.read_text()
    write()
    assert page.read_text() == before
    # nor is what belongs to rows that are not asked for lost, or put first
    study = study.only(None, ["majority_kernels"])
    write()
    assert page.read_text() == before
    average = replace(study.known["majority_kernels"], name="k_average", method="k_average")
    study = replace(study, stages=[[study.known["plain"], average]], wanted=None)
    with pytest.raises(StudyError, match="tiny: k_average is made of other networks"):
        write()


def test_the_middle_of_a_run():
    rows = [{"epoch": float(epoch), "loss": 10.0 * epoch} for epoch in range(1, 13)]
    assert middle(rows) == {"epoch": 6.0, "loss": 60.0}
    kernels = [{"epoch": 1.0, "curvature": 0.2, "decay": 0.1, "preconditioned": 2.0}]
    assert middle(kernels)["measured"] == pytest.approx(0.6)


def test_gradients_are_compared_at_the_same_training_loss():
    """Two runs with ‖g‖² = c L², one of which is slower: the ratio of the constants, whatever the epochs."""

    def run(c, pace):
        losses = [2.0 ** (-pace * epoch) for epoch in range(1, 13)]
        return [{"epoch": e, "loss": loss, "batch_gradient": c * loss**2} for e, loss in enumerate(losses, start=1)]

    assert at_equal_loss(run(3.0, 0.5), run(4.0, 0.7)) == pytest.approx(0.75)
    assert math.isnan(at_equal_loss(run(3.0, 9.0), run(4.0, 0.1)))  # never the same
