"""The study's baselines against computations of their own."""

import inspect

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("sklearn")

from benchmarks.quality.baselines.averaging import EpochAverage, MeanProbability, mean_state
from benchmarks.quality.baselines.noise import GradientNoise
from benchmarks.quality.baselines.steps import amplification, distill, penalize, use_sgd
from benchmarks.quality.derive import transfer
from benchmarks.quality.reading import read_study
from lightning_sop import MajorityKernels
from lightning_sop.dynamics.flops import flops_of
from lightning_sop.zoo import MLP, ImageClassifier, LanguageModel
from tests.test_quality import random_state, study, write_study  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


class Small(LightningModule):
    """Three numbers and a quadratic loss: Hessian H, gradient H w."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.lr, self.weight_decay = lr, 0.0
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.register_buffer("h", torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 3.0]], dtype=torch.float64))
        self.before = []

    def training_step(self, batch, batch_idx):
        self.before.append(self.w.detach().clone())
        return 0.5 * self.w @ self.h @ self.w

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.w.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(count=3):
    return DataLoader(TensorDataset(torch.zeros(count, 1)), batch_size=1)


def trainer(*callbacks, epochs=1, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, callbacks=list(callbacks), **quiet, **options
    )


class Watch(Callback):
    """Weights after each epoch, and those that were validated."""

    def __init__(self):
        self.ends, self.validated, self.rates = [], [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.last = module.w.detach().clone()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_validation_epoch_start(self, trainer, module):
        self.ends.append(self.last)

    def on_validation_epoch_end(self, trainer, module):
        self.validated.append(module.w.detach().clone())


def test_swa_averages_the_last_epochs():
    module, watch = Small(), Watch()
    fit = trainer(watch, EpochAverage(start=0.5, floor=0.0), epochs=6)
    fit.fit(module, loader(), loader(1))
    ends = torch.stack(watch.ends)
    for epoch in range(3):
        assert torch.equal(watch.validated[epoch], ends[epoch])
    for epoch in range(3, 6):
        assert torch.allclose(watch.validated[epoch], ends[3 : epoch + 1].mean(0))
    # training itself is that of the plain network
    w = Small().w.detach()
    for _ in range(18):
        w = w - 0.1 * module.h @ w
    assert torch.allclose(ends[-1], w)
    assert torch.allclose(module.w, ends[3:].mean(0))


def test_swa_holds_the_rate_at_its_floor_and_estimates_batchnorm_anew():
    class Cosine(Small):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    watch = Watch()
    trainer(watch, EpochAverage(start=0.5, floor=0.3), epochs=4).fit(Cosine(), loader(), loader(1))
    cosine = [0.05 * (1 + np.cos(np.pi * step / 12)) for step in range(12)]
    assert watch.rates == pytest.approx([max(0.03, rate) for rate in cosine])

    class Normed(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(self.layer(x))

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().sum(1).sub(1).square().mean() + self.layer.weight.square().sum()

        def validation_step(self, batch, batch_idx):
            self.state = {name: value.clone() for name, value in self.state_dict().items()}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.randn(12, 2)
    module = Normed()
    trainer(EpochAverage(start=0.0, batches=3), epochs=3).fit(
        module, DataLoader(TensorDataset(data), batch_size=4), loader(1)
    )
    seen = F.linear(data, module.state["layer.weight"], module.state["layer.bias"])
    assert torch.allclose(module.state["norm.running_mean"], seen.mean(0), atol=1e-5)
    variances = torch.stack([part.var(0) for part in seen.split(4)]).mean(0)
    assert torch.allclose(module.state["norm.running_var"], variances, atol=1e-5)


def test_the_study_measures_the_defaults():
    (callback,) = read_study("core").methods["majority_kernels"].callbacks
    written = callback["init_args"]["method"]["init_args"]
    defaults = {name: parameter.default for name, parameter in inspect.signature(MajorityKernels).parameters.items()}
    assert written.items() <= defaults.items()


def test_gradient_noise_has_its_variance_and_leaves_other_generators_alone():
    noise, module = GradientNoise(eta=4.0, gamma=0.5), Small()
    module.w = nn.Parameter(torch.zeros(40_000, dtype=torch.float64))
    module.h = torch.zeros(1, 1, dtype=torch.float64)
    module.training_step = lambda batch, index: module.w.sum() * 0
    noise._generator = torch.Generator().manual_seed(1)
    state = torch.get_rng_state()
    for step in (0, 3):
        module.w.grad = torch.zeros_like(module.w)
        noise.on_before_optimizer_step(type("At", (), {"global_step": step}), module, None)
        assert float(module.w.grad.std()) == pytest.approx(2 / (1 + step) ** 0.25, rel=0.03)
    assert torch.equal(torch.get_rng_state(), state)
    trainer(GradientNoise()).fit(Small(), loader())


def test_gradient_penalty_is_that_of_the_formula():
    module = Small(lr=0.1)
    penalize(module, 4, "dirichlet", 10)
    trainer(epochs=1).fit(module, loader(2))
    h, w, a = module.h, Small().w.detach(), 4 * 2 / 5
    for _ in range(2):
        w = w - 0.1 * (h @ w + 10 * 0.1 / 4 * (a - 1) * 2 * h @ h @ w)
    assert torch.allclose(module.w, w)


def test_amplification_is_that_of_the_draws():
    # papers.md: Dirichlet(1) 1.33, 1.50, 1.60, 1.78 and normalized uniform 1.23, 1.29, 1.31, 1.33 for k = 2, 3, 4, 8
    found = [amplification(k, draw) for draw in ("dirichlet", "uniform") for k in (2, 3, 4, 8)]
    assert found == pytest.approx([1.33, 1.50, 1.60, 1.78, 1.23, 1.29, 1.31, 1.33], abs=0.006)
    assert amplification(4, "one_hot") == pytest.approx(4)


def test_second_derivatives_go_through_attention():
    module = LanguageModel(vocabulary=7, context=5, width=8, depth=1, heads=2)
    penalize(module, 4, "uniform", 1)
    tokens = torch.randint(7, (2, 6))
    module.backward(module.training_step((tokens[:, :-1], tokens[:, 1:]), 0))
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_distillation_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    module = ImageClassifier(image_shape=(1, 2, 2), num_classes=3, width=4, depth=1)
    distill(module, temperature=2.0, mix=0.7)
    module.teachers = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)]
    images, labels = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    module.training_step((images, labels), 0).backward()
    logits = module.net(images).detach().double().numpy()
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)  # noqa: E731
    with torch.no_grad():
        soft = sum(softmax(teacher(images).double().numpy() / 2) for teacher in module.teachers) / 2
    hard = softmax(logits) - np.eye(3)[labels.numpy()]
    # the derivative of T² KL by logits is T (student at T - teachers at T)
    expected = (0.3 * hard + 0.7 * 2 * (softmax(logits / 2) - soft)) / 5
    assert module.net.head.bias.grad.numpy() == pytest.approx(expected.sum(0), abs=1e-6)
    units = F.relu(module.net.hidden[0](images.flatten(1))).detach().double().numpy()
    assert module.net.head.weight.grad.numpy() == pytest.approx(expected.T @ units, abs=1e-6)
    module.eval()
    assert torch.equal(module(images), module.net(images))


def test_forwards_of_teachers_are_counted_in_transformers():
    module = LanguageModel(vocabulary=7, context=8, width=16, depth=1, heads=2)
    tokens = torch.randint(7, (2, 9))
    batch = (tokens[:, :-1], tokens[:, 1:])
    plain = flops_of(lambda: module.training_step(batch, 0)).forward
    module.teachers = [LanguageModel(vocabulary=7, context=8, width=16, depth=1, heads=2).eval() for _ in range(2)]
    distill(module, temperature=2.0, mix=0.5)
    assert flops_of(lambda: module.training_step(batch, 0)).forward == 3 * plain
    assert torch.backends.mha.get_fastpath_enabled()


def test_average_and_ensemble_of_networks():
    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    mean = mean_state([first.state_dict(), second.state_dict()])
    assert torch.allclose(mean["weight"], (first.weight + second.weight) / 2)
    x = torch.randn(4, 2)
    probabilities = (first(x).softmax(1) + second(x).softmax(1)) / 2
    assert torch.allclose(MeanProbability([first, second])(x).exp(), probabilities, atol=1e-6)


def test_sgd_takes_the_place_of_adamw():
    module = ImageClassifier(lr=0.3, weight_decay=0.01)
    use_sgd(module, momentum=0.8)
    fit = trainer(limit_train_batches=0, epochs=2)
    fit.fit(module, DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())))
    assert isinstance(module.configure_optimizers()["optimizer"], torch.optim.SGD)


def test_only_the_head_is_not_transferred():
    source, target = MLP((1, 2, 2), 3, width=4), MLP((1, 2, 2), 3, width=4)
    head = target.head.weight.detach().clone()
    transfer(source.state_dict(), target)
    assert torch.equal(target.hidden[0].weight, source.hidden[0].weight)
    assert torch.equal(target.head.weight, head)
