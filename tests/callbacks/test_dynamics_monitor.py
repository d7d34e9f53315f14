"""What DynamicsMonitor logs, against values that were computed beside it, with other means, from the same run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop import DynamicsMonitor, MajorityKernels, Rule, SimulatedOverparam
from lightning_sop.dynamics.kernels import predicted_amplification
from lightning_sop.dynamics.quantities import MONITOR, TABLE, find
from tests.callbacks.helpers import Classifier, overparam, seeded
from tests.callbacks.monitoring import csv_run, monitored

K, LR = 3, 1e-2


class Beside(Callback):
    """Computes everything anew in numpy, in float64, from tensors that it copies in the same hooks."""

    def __init__(self, layers: tuple[str, ...] = ("net.0", "net.4")) -> None:
        self.layers = layers
        self.rows: dict[int, dict[str, float]] = {}
        self.mixes: list[dict[str, Tensor]] = []

    def __deepcopy__(self, memo: Any) -> Beside:
        return self

    def _forms(self, trainer: pl.Trainer) -> dict[str, Any]:
        engine = next(c.engine for c in trainer.callbacks if isinstance(c, SimulatedOverparam))
        return {name.removesuffix(".weight"): form for name, form in engine.forms.items()}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        row = self.rows[trainer.global_step] = {}
        forms = self._forms(trainer)
        self.mixes.append({layer: forms[layer].mix.clone() for layer in self.layers})
        self.means = {}
        for layer in self.layers:
            kernels = np.stack([phi.detach().double().numpy() for phi in forms[layer].phi])
            mean = self.means[layer] = kernels.mean(0)
            row[f"weights/norm/{layer}"] = np.linalg.norm(mean)
            deviations = np.linalg.norm((kernels - mean).reshape(K, -1), axis=1)
            row[f"kernels/spread/{layer}"] = math.sqrt((deviations**2).sum() / (K - 1)) / np.linalg.norm(mean)
            units = kernels.reshape(K, -1) / np.linalg.norm(kernels.reshape(K, -1), axis=1, keepdims=True)
            row[f"kernels/cosine/{layer}"] = (units @ units.T)[~np.eye(K, dtype=bool)].mean()
            row |= {f"weights/{name}/{layer}": value for name, value in ranks(mean)}
        for name, weights in (("mixed", self.mixes[-1]), ("collapsed", None)):
            tensors = {}
            for layer in self.layers:
                mix = np.full(K, 1 / K) if weights is None else weights[layer].numpy()
                stack = np.stack([phi.detach().double().numpy() for phi in forms[layer].phi])
                tensors[layer] = torch.tensor(np.einsum("kc,kcd->cd" if mix.ndim == 2 else "k,kcd->cd", mix, stack))
            row[f"loss/{name}"] = loss_by_hand(pl_module, tensors, batch)
        row["loss/gap"] = row["loss/mixed"] - row["loss/collapsed"]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        row = self.rows[trainer.global_step]
        drawn_at = max(0, trainer.global_step - 1) / 8  # after the step before; the first one before all steps
        a = predicted_amplification("uniform", K, kept=1 - drawn_at)
        squares = {name: float(p.grad.double().square().sum()) for name, p in pl_module.named_parameters()}
        lr = optimizer.param_groups[0]["lr"]
        row["gradients/norm"] = math.sqrt(sum(squares.values()))
        row["gradients/igr"] = lr / 4 * sum(squares.values())
        own = {f"{layer}.weight" for layer in self.layers}
        row["gradients/igr_amplified"] = lr / 4 * sum(s * (a if n in own else 1) for n, s in squares.items())
        for layer in self.layers:
            row[f"gradients/norm/{layer}"] = math.sqrt(squares[f"{layer}.weight"])
            row[f"gradients/igr/{layer}"] = lr / 4 * squares[f"{layer}.weight"]
            row[f"gradients/igr_amplified/{layer}"] = a * lr / 4 * squares[f"{layer}.weight"]
            row[f"kernels/amplification_predicted/{layer}"] = a

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = self.rows[trainer.global_step - 1]
        forms = self._forms(trainer)
        states = {"exp_avg": [], "exp_avg_sq": []}
        for layer in self.layers:
            mean = np.stack([phi.detach().double().numpy() for phi in forms[layer].phi]).mean(0)
            update = mean - self.means[layer]
            row[f"updates/norm/{layer}"] = np.linalg.norm(update)
            row[f"updates/ratio/{layer}"] = np.linalg.norm(update) / np.linalg.norm(self.means[layer])
            row |= {f"updates/{name}/{layer}": value for name, value in ranks(update)}
            state = trainer.optimizers[0].state_dict()["state"]
            number = [name for name, _ in pl_module.named_parameters()].index(f"{layer}.weight")
            for entry, norms in states.items():
                norms.append(np.linalg.norm(state[number][entry].double().numpy()))
                row[f"optimizer/{entry}/{layer}"] = norms[-1]
        for entry, norms in states.items():
            row[f"optimizer/{entry}"] = math.sqrt(sum(norm**2 for norm in norms))


def ranks(matrix: np.ndarray) -> Iterator[tuple[str, float]]:
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values[values > 0] / values.sum()
    yield "effective_rank", math.exp(-(shares * np.log(shares)).sum())
    yield "stable_rank", (values**2).sum() / values[0] ** 2


def loss_by_hand(module: Any, weights: dict[str, Tensor], batch: Any) -> float:
    """The network of helpers.network(), layer by layer in float64: norms over the batch, no dropout."""
    net, x = module.net, batch[0].double()
    x = x @ weights["net.0"].T + net[0].bias.detach().double()
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + net[1].eps).sqrt()
    x = (x * net[1].weight.double() + net[1].bias.double()).relu()
    x = x @ weights["net.4"].T + net[4].bias.detach().double()
    return float(F.cross_entropy(x, batch[1]).detach())


def test_every_number_is_that_of_another_computation(tmp_path: Path) -> None:
    beside = Beside()
    monitor = DynamicsMonitor(["*"], every=1, slow=1)
    rows = monitored(seeded(Classifier, dropout=0.3), tmp_path, overparam(K), monitor, beside, max_epochs=2)
    assert set(rows) == set(range(8)) == set(beside.rows)
    for step, expected in beside.rows.items():
        for name, value in expected.items():
            rel = 2e-3 if name.startswith("updates/") else 2e-5  # a difference of float32 weights
            assert rows[step][name] == pytest.approx(value, rel=rel, abs=1e-6), f"{name} at {step}"
    for step, row in rows.items():
        mixes = beside.mixes[step]
        for layer, mix in mixes.items():  # measured at every step: one draw each
            v = mix.numpy()
            assert row[f"kernels/amplification/{layer}"] == pytest.approx(K * (v**2).sum())
            assert row[f"kernels/entropy/{layer}"] == pytest.approx(-(v * np.log(v)).sum() / math.log(K))
        for name in ("kernels/spread", "weights/norm", "updates/ratio", "updates/effective_rank", "kernels/entropy"):
            assert row[name] == pytest.approx(sum(row[f"{name}/{layer}"] for layer in mixes) / 2)
        assert [name for name in row if find(name) is None] == []


def test_draws_are_averaged_between_measurements(tmp_path: Path) -> None:
    beside = Beside()
    monitor = DynamicsMonitor(["kernels/amplification"], every=3)
    rows = monitored(seeded(Classifier), tmp_path, overparam(K), monitor, beside, max_epochs=2)
    assert set(rows) == {0, 3, 6}
    for step, steps in ((0, [0]), (3, [1, 2, 3]), (6, [4, 5, 6])):
        for layer in beside.layers:
            found = [K * float(beside.mixes[n][layer].square().sum()) for n in steps]
            assert rows[step][f"kernels/amplification/{layer}"] == pytest.approx(sum(found) / len(found))


@pytest.mark.parametrize("granularity", ["step", "out_channel"])
def test_draws_of_other_granularities(granularity: str, tmp_path: Path) -> None:
    method = MajorityKernels(K, granularity=granularity)
    beside = Beside()
    monitor = DynamicsMonitor(["kernels/*"], every=1)
    rows = monitored(seeded(Classifier), tmp_path, SimulatedOverparam(method, verbose=False), monitor, beside, max_epochs=1)
    for step, row in rows.items():
        for layer, mix in beside.mixes[step].items():
            assert row[f"kernels/amplification/{layer}"] == pytest.approx(float((K * mix.square().sum(0)).mean()))
        if granularity == "step":
            assert row["kernels/amplification/net.0"] == row["kernels/amplification/net.4"]


def test_annealing_is_seen_in_the_prediction(tmp_path: Path) -> None:
    method = MajorityKernels(K, anneal=1.0)
    monitor = DynamicsMonitor(["kernels/amplification_predicted"], every=1)
    rows = monitored(seeded(Classifier), tmp_path, SimulatedOverparam(method, verbose=False), monitor, max_epochs=2)
    full = predicted_amplification("uniform", K) - 1
    for step, row in rows.items():
        drawn_at = max(0, step - 1) / 8  # after the step before
        assert row["kernels/amplification_predicted"] == pytest.approx(1 + (1 - drawn_at) ** 2 * full)


def test_the_gradients_scale_is_part_of_the_rate(tmp_path: Path) -> None:
    """With s instead of k the mean kernel moves by h s/k."""
    rows = []
    for scale in (None, 1.5):
        method = MajorityKernels(K, gradient_scale=scale)
        monitor = DynamicsMonitor(["gradients/*"], every=10)
        model = seeded(Classifier, optimizer="sgd")
        rows.append(monitored(model, tmp_path, SimulatedOverparam(method, verbose=False, seed=0), monitor, max_epochs=1)[0])
    plain, scaled = rows
    assert scaled["gradients/norm/net.0"] == plain["gradients/norm/net.0"]
    assert scaled["gradients/igr/net.0"] == pytest.approx(plain["gradients/igr/net.0"] * 1.5 / K)


# ---------------------------------------------------------------------- names


def test_what_a_run_logs_is_the_table(tmp_path: Path) -> None:
    """Names in the file are in the table, and every default row that can be a number is in the file."""
    rows = csv_run(seeded(Classifier), tmp_path, overparam(K), DynamicsMonitor(), max_epochs=1)
    names = {name for row in rows for name in row} - {"epoch", "step", "val_loss"}
    assert [name for name in names if find(name) is None] == []
    logged = {find(name).name for name in names}
    seams = {"growth/event", "growth/donor_loss", "growth/fused_loss"}
    seams |= {"optimizer/{entry}_before_growth", "optimizer/{entry}_after_growth"}
    assert logged == {r.name for r in TABLE if r.default and r.logged_by == MONITOR and r.kind == "scalar"} - seams
    for row in TABLE:  # of layers and of the run
        if row.name in logged and row.name != "optimizer/{entry}":
            assert row.name in names, row.name
            assert (f"{row.name}/net.0" in names) == (row.per == "layer"), row.name
    assert {row["step"] for row in rows if "weights/norm" in row} == {"0"}


def test_every_and_slow(tmp_path: Path) -> None:
    monitor = DynamicsMonitor(["weights/norm", "weights/effective_rank"], every=2, slow=3)
    rows = monitored(seeded(Classifier), tmp_path, monitor, max_epochs=4)  # 16 steps
    assert list(rows) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [step for step, row in rows.items() if "weights/effective_rank" in row] == [0, 6, 12]


class Wide(Classifier):
    """With many layers."""

    def __init__(self, layers: int = 31) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(10, 10) for _ in range(layers - 1)), nn.Linear(10, 5))


@pytest.mark.parametrize(("layers", "options", "single"), [
    (30, {}, 30),
    (31, {}, 0),
    (31, {"per_layer": True}, 31),
    (30, {"per_layer": False}, 0),
    (31, {"layers": ["net.1?"]}, 10),
])  # fmt: skip
def test_layers_one_by_one_up_to_thirty(layers: int, options: dict[str, Any], single: int, tmp_path: Path) -> None:
    monitor = DynamicsMonitor(["weights/norm"], every=10, **options)
    (row,) = monitored(seeded(Wide, layers), tmp_path, monitor, limit_train_batches=1, max_epochs=1).values()
    assert len(row) == single + 1 and "weights/norm" in row


def test_which_weights_are_measured(tmp_path: Path) -> None:
    only = SimulatedOverparam(rules=[Rule(MajorityKernels(2), include=["net.0"])], verbose=False)

    def names(*callbacks: Callback, **options: Any) -> set[str]:
        monitor = DynamicsMonitor(every=10, **options)
        rows = monitored(seeded(Classifier), tmp_path, *callbacks, monitor, limit_train_batches=1, max_epochs=1)
        shown = ("weights/norm/", "kernels/spread/")
        return {name for row in rows.values() for name in row if name.startswith(shown)}

    both = {"weights/norm/net.0", "weights/norm/net.4"}
    assert names(only) == {"weights/norm/net.0", "kernels/spread/net.0"}
    assert names() == both
    assert names(only, layers=["net"]) == both | {"kernels/spread/net.0"}
    assert names(only, layers=["*.4"]) == {"weights/norm/net.4"}
    with pytest.raises(
        ValueError, match=r"DynamicsMonitor: the pattern 'head' matches no weight .* net.0.weight, net.4.weight"
    ):
        names(layers=["head"])


def test_embeddings_are_measured_where_they_have_a_form(tmp_path: Path) -> None:
    class Tokens(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(60, 5))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs.abs().long().clamp(max=6))

    callback = SimulatedOverparam(MajorityKernels(2), layers=["Embedding"], verbose=False)
    rows = monitored(seeded(Tokens), tmp_path, callback, DynamicsMonitor(["weights/norm"]), max_epochs=1)
    assert set(rows[0]) == {"weights/norm", "weights/norm/net.0"}


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a whole number, at least 1, not 0"),
        ({"slow": 1.5}, "slow must be a whole number"),
        ({"every": True}, "every must be"),
        ({"quantities": "weights/norm"}, r"quantities takes a list, not the single string 'weights/norm'"),
        ({"layers": "net"}, "layers takes a list"),
        ({"media": "yes"}, "media must be True, False or 'auto', not 'yes'"),
        ({"quantities": ["weights/nrom"]}, "'weights/nrom' is not in the table; there are kernels/spread"),
        ({"quantities": ["cost/*"]}, r"'cost/\*' is logged by TrainingCost"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DynamicsMonitor: .*{message}|DynamicsMonitor: {message}"):
        DynamicsMonitor(**arguments)
