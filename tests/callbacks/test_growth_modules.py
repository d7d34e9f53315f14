"""Modules of many kinds grow, and keep what is theirs."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_sop import AtStep, CollapseOnSave, DeepFusionGrow, FusionError
from lightning_sop.zoo import Digits, ImageClassifier, LanguageModel
from tests.callbacks.growing import Growable, Watch, donor, every_epoch, grow, make, network
from tests.callbacks.helpers import Manual, fit, same_tensors, seeded, trainer


class InSetup(Growable):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.net

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            assert self.trainer.max_epochs > 0
            self.net = network(self.hparams["width"])


class InConfigureModel(Growable):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = network(self.hparams["width"])


class ManualGrowable(Growable):
    """Two optimizers stepped by hand, and networks of any width."""

    training_step, configure_optimizers = Manual.training_step, Manual.configure_optimizers

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 1))


class HandAccumulated(Growable):
    """Steps its optimizer every third batch by hand."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        if self._trainer is None:
            return
        self.manual_backward(loss / 3)
        assert all(p.grad is not None for p in self.parameters())
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ReturnsDict(Growable):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "batch_idx": batch_idx}


class Parts(Growable):
    """Calls its networks one by one, and keeps widths and lists of them as attributes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.width, self.shape = width, {"hidden": (width, width)}
        self.body, self.head = nn.Sequential(*list(self.net)[:-1]), self.net[-1]
        del self.net
        self.listed = [self.body, self.head]

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.listed[0](inputs)
        return self.listed[1](hidden.view(-1, self.width))


class Positions(Growable):
    """A parameter goes into a module, as the embedding of positions into dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.positions, self.drop = nn.Parameter(torch.randn(1, width) * 0.1), nn.Dropout(0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net[1:](self.net[0](inputs) + self.drop(self.positions))


class Normed(Growable):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.net[4] = nn.utils.parametrizations.weight_norm(self.net[4])


@pytest.mark.parametrize("build", [Positions, Normed])
@pytest.mark.parametrize("options", [{}, {"width": 20, "widen": "gradmax"}], ids=["copies", "gradmax"])
def test_parameters_that_go_into_modules_have_gradients_too(build: Any, options: dict[str, Any], tmp_path: Path) -> None:
    event = grow(4, **options)
    run = fit(seeded(build), tmp_path, event, max_epochs=2)
    event = next(callback for callback in run.callbacks if isinstance(callback, DeepFusionGrow))
    assert event.grown_at == 4
    assert event._factors  # by learning_rate="match"


def test_why_learning_rates_stay_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(seeded(ManualGrowable), tmp_path, grow(4), max_epochs=2)
    assert "training_step gives no gradient outside of its Trainer (RuntimeError: " in caplog.text


class WithHparams(pl.LightningModule):
    """Takes all hyper-parameters as one argument."""

    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.net = network(hparams["width"])

    forward, training_step = Growable.forward, Growable.training_step
    losses: list[float] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    train_dataloader = Growable.train_dataloader


@pytest.mark.parametrize(
    "build", [InSetup, InConfigureModel, ManualGrowable, HandAccumulated, ReturnsDict, Parts], ids=lambda cls: cls.__name__
)
def test_modules_of_many_kinds(build: Any, tmp_path: Path) -> None:
    model = seeded(build)
    plain = seeded(build)
    fit(plain, tmp_path / "plain", max_epochs=3)
    event = grow(4 if build is not HandAccumulated else 2)
    run = fit(model, tmp_path, event, ModelCheckpoint(tmp_path, filename="x"), max_epochs=3)
    # where the step needs its Trainer, a live one is listened to, and growth comes after it
    assert run.callbacks[0].grown_at == {HandAccumulated: 2, ManualGrowable: 5}.get(build, 4)
    assert {p.shape[0] for p in model.parameters()} == {16, 5} | ({1} if build is ManualGrowable else set())
    index = {HandAccumulated: 6, ManualGrowable: 5}.get(build, 4)
    assert model.losses[:index] == plain.losses[:index]
    assert model.losses[index] == pytest.approx(plain.losses[index], rel=1e-4)  # the function is kept
    held = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    if build not in (InSetup, InConfigureModel):
        again = build.load_from_checkpoint(tmp_path / "x.ckpt")
        assert same_tensors(dict(again.state_dict()), dict(model.state_dict()))
    before = copy.deepcopy(model.state_dict())
    run.fit_loop.max_epochs = 5
    run.fit(model)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_all_hyper_parameters_in_one_argument(tmp_path: Path) -> None:
    model = seeded(WithHparams, {"width": 8, "other": 1})
    fit(model, tmp_path, grow(2), ModelCheckpoint(tmp_path, filename="x"), max_epochs=1)
    again = WithHparams.load_from_checkpoint(tmp_path / "x.ckpt")
    assert again.hparams == {"width": 16, "other": 1} and same_tensors(dict(again.state_dict()), dict(model.state_dict()))


class FromDict(pl.LightningModule):
    """Nested hyper-parameters."""

    training_step, forward, train_dataloader = Growable.training_step, Growable.forward, Growable.train_dataloader
    configure_optimizers = WithHparams.configure_optimizers

    def __init__(self, net: dict[str, Any], rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net, self.losses = network(**net), []


def test_nested_hyper_parameters(tmp_path: Path) -> None:
    given = {"width": 8, "dropout": 0.0}
    model = seeded(FromDict, given)
    event = grow(2, grown={"net.width": 16})
    fit(model, tmp_path, event, ModelCheckpoint(tmp_path, filename="x"), max_epochs=1)
    assert model.hparams == {"net": {"width": 16, "dropout": 0.0}, "rate": 0.1} and given["width"] == 8
    again = FromDict.load_from_checkpoint(tmp_path / "x.ckpt")
    assert same_tensors(dict(again.state_dict()), dict(model.state_dict()))


class Owner(Growable):
    """Everything that a user may hang on a module."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width, dropout=0.1)
        self.accuracy = MulticlassAccuracy(5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scale", torch.ones(width), persistent=False)
        self.settings = Settings(width)
        self.notes: list[Any] = []
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.seen += 1
        self.accuracy.update(self(batch[0]), batch[1])
        self.notes.append(batch_idx)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class Settings:
    def __init__(self, width: int) -> None:
        self.width, self.seen = width, None


def test_what_is_the_users_stays(tmp_path: Path) -> None:
    model = seeded(Owner)
    model.net[0].weight.requires_grad_(False)
    model.net[0].bias.requires_grad_(False)
    model.net[1].eval()
    model.net[4].weight.mark = "mine"
    calls: list[Any] = []
    model.net[4].register_forward_hook(lambda *_: calls.append("forward"))
    handle = model.net[4].weight.register_hook(lambda gradient: calls.append(tuple(gradient.shape)))
    kept = {name: id(getattr(model, name)) for name in ("accuracy", "notes", "optimizer", "net", "losses")}
    shapes: list[Any] = []

    def look(run: pl.Trainer, module: Any) -> None:
        shapes.append(tuple(module.net[4].weight.shape))
        number = run.global_step
        assert module.seen == number == len(module.notes) == len(module.losses) == module.accuracy._update_count
        assert {name: id(getattr(module, name)) for name in kept} == kept
        assert not module.net[0].weight.requires_grad and module.net[4].weight.requires_grad
        assert not module.net[1].training and module.net[3].training and module.net[4].weight.mark == "mine"
        assert module.settings.width == module.net[0].weight.shape[0] == len(module.scale)
        live = {id(p) for p in module.parameters()}
        assert {id(p) for group in module.optimizer.param_groups for p in group["params"]} == live

    frozen = model.net[0].weight.detach().clone()
    fit(model, tmp_path, grow(4), Watch(look), max_epochs=2, limit_val_batches=0)
    assert shapes == [(8, 8)] * 4 + [(16, 16)] * 4
    assert calls.count("forward") > 8 and calls.count((8, 8)) >= 4 and calls.count((16, 16)) >= 4
    assert torch.equal(model.net[0].weight, torch.cat([frozen, frozen]))
    handle.remove()
    assert not model.net[4].weight._backward_hooks


def test_a_function_made_for_the_old_width_is_refused(tmp_path: Path) -> None:
    """A module that would compute something else in place than built anew; and it stays as it was."""

    class Stubborn(Growable):
        def __init__(self, width: int = 8) -> None:
            super().__init__(width)
            self.scaled = functools.partial(torch.mul, 8 / width)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.scaled(self.net(inputs)) + self.scaled(torch.ones(5)).sum() * 0

    class Fixed(Stubborn):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.scaled(self.net(inputs)) * (self.hparams["width"] / 8)

    model = seeded(Fixed)
    seen: list[Any] = []

    def look(run: pl.Trainer, module: pl.LightningModule) -> None:
        seen[:] = [copy.deepcopy(module.state_dict()), copy.deepcopy(run.optimizers[0].state_dict())]

    run = trainer(tmp_path, grow(3), Watch(look))
    with pytest.raises(FusionError, match="Fixed does not compute with the grown tensors what it computes when it is built"):
        run.fit(model)
    assert same_tensors(dict(model.state_dict()), dict(seen[0]))
    assert same_tensors(run.optimizers[0].state_dict(), seen[1])
    assert model.hparams["width"] == 8 and model.net[0].out_features == 8


class Texts(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        tokens = torch.randint(16, (32, 9), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=8)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model(tied: bool, tmp_path: Path) -> None:
    small = {"vocabulary": 16, "context": 8, "width": 8, "depth": 1, "heads": 2, "tied": tied}
    model = seeded(LanguageModel, **small)
    run = trainer(tmp_path, DeepFusionGrow(grown={"width": 16, "heads": 4}, schedule=AtStep(3)))
    run.fit(model, Texts())
    assert run.callbacks[0].fusion.proof.gap <= 1e-5
    assert (model.net.embedding.weight is model.net.head.weight) == tied
    assert model.net.layers[0].self_attn.num_heads == 4 and model.net.layers[0].self_attn.embed_dim == 16
    wide = LanguageModel(**{**small, "width": 16, "heads": 4})
    wide.load_state_dict(model.state_dict())
    tokens = torch.randint(16, (3, 8))
    torch.testing.assert_close(model.eval()(tokens), wide.eval()(tokens))


@pytest.mark.parametrize("net", ["mlp", "resnet", "vit"])
def test_image_classifiers(net: str, tmp_path: Path) -> None:
    more = {"heads": 4} if net == "vit" else {}
    start = {"heads": 2} if net == "vit" else {}
    model = seeded(ImageClassifier, net, width=8, depth=1, **start)
    run = trainer(
        tmp_path,
        DeepFusionGrow(grown={"width": 16, **more}, schedule=AtStep(2), verbose=False),
        max_steps=4,
        limit_val_batches=1,
    )
    run.fit(model, Digits(batch_size=16, num_workers=0))
    assert run.callbacks[0].fusion.proof.gap <= 1e-5 and model.hparams["width"] == 16


# ------------------------------------------------------------------ donors


def test_two_trained_networks(tmp_path: Path) -> None:
    """Of different widths, with their optimizers' states; the grown network computes their average."""
    paths = [donor(tmp_path, "a", 1), donor(tmp_path, "b", 2, epochs=2, width=12)]
    model = make(width=20)
    start: list[Any] = []
    run = fit(model, tmp_path / "x", grow(0, 20, donors=paths), Watch(lambda r, m: start.append(r)), max_epochs=1)
    one, two = (Growable.load_from_checkpoint(path).eval() for path in paths)
    inputs = torch.randn(64, 10, generator=torch.Generator().manual_seed(3))
    expected = F.cross_entropy((one.train()(inputs[:16]) + two.train()(inputs[:16])) / 2, inputs[:16, :5].argmax(1))
    assert model.losses[0] == pytest.approx(expected.item(), rel=1e-4)
    steps = {float(state["step"]) for state in run.optimizers[0].state.values()}
    assert steps == {8.0 + 4.0}  # of the donor that was trained longer, and of this run


def test_this_network_and_a_trained_one(tmp_path: Path) -> None:
    path = donor(tmp_path, "a", 1, width=12)
    model = make()
    run = fit(model, tmp_path / "x", grow(3, 20, donors=["self", path]), max_epochs=2)
    assert run.callbacks[0].grown_at == 3 and run.callbacks[0].fusion.layout.weights == (0.5, 0.5)
    momentum = run.optimizers[0].state[model.net[0].weight]["exp_avg"]
    assert momentum.shape == (20, 10) and momentum[:8].any() and momentum[8:].any()


def test_deploy_files_as_donors(tmp_path: Path) -> None:
    """They hold no optimizer state, and count as at rest."""
    paths = []
    for seed, format in ((1, "ckpt"), (2, "safetensors")):
        torch.manual_seed(seed)
        name = f"donor{seed}"
        saver = ModelCheckpoint(tmp_path, filename=name, enable_version_counter=False)
        fit(Growable(), tmp_path / name, CollapseOnSave(format), saver, max_epochs=1)
        paths.append(str(next(tmp_path.glob(f"{name}.deploy.*"))))
    model = make()
    run = fit(model, tmp_path / "x", grow(4, 24, donors=["self", *paths]), max_epochs=2)
    assert run.callbacks[0].grown_at == 4 and model.net[0].weight.shape == (24, 10)
    fresh = make(width=16)
    run = fit(fresh, tmp_path / "y", grow(0, 16, donors=paths), max_epochs=1)
    assert {float(state["step"]) for state in run.optimizers[0].state.values()} == {4.0}


def test_three_copies(tmp_path: Path) -> None:
    model = make()
    run = fit(model, tmp_path, grow(4, 24, copies=3))
    assert run.callbacks[0].fusion.layout.weights == pytest.approx((0.2, 1 / 3, 7 / 15))
    assert model.net[4].weight.shape == (24, 24)


class Holder(pl.LightningModule):
    """Its network comes from outside, which no hyper-parameter describes."""

    training_step, train_dataloader = Growable.training_step, Growable.train_dataloader

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []
        self.tail = nn.Linear(5, 5)
        self.tags = {"made": object()}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.tail(self.net(inputs))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_target(tmp_path: Path) -> None:
    target = {"class_path": "tests.callbacks.growing.network", "init_args": {"width": 16}}
    event = DeepFusionGrow(grown=target, target="net", schedule=AtStep(6), verbose=False)
    full = seeded(Holder, seeded(network, 8))
    tail, tags = full.tail.weight, full.tags["made"]
    whole = fit(full, tmp_path, event, every_epoch(tmp_path), max_epochs=4)
    assert full.net[0].weight.shape == (16, 10) and full.net[0].out_features == 16
    assert full.tail.weight is tail and full.tags["made"] is tags
    for epoch in (0, 2):
        part = seeded(Holder, seeded(network, 8))
        run = fit(part, tmp_path / "x", event, every_epoch(tmp_path), max_epochs=4, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert part.losses == full.losses[4 * (epoch + 1) :]
        assert same_tensors(dict(part.state_dict()), dict(full.state_dict()))
        assert same_tensors(run.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


# ------------------------------------------------------------------ optimizers


@pytest.mark.parametrize("optimizer", ["lbfgs", "asgd"])
def test_an_optimizer_that_starts_anew(optimizer: str, tmp_path: Path) -> None:
    model = make(optimizer=optimizer, scheduler=False)
    name = {"lbfgs": "LBFGS", "asgd": "ASGD"}[optimizer]
    with pytest.warns(UserWarning, match=f"{name}: how this state grows is not known"):
        run = fit(model, tmp_path, grow(6), max_epochs=3)
    assert model.losses[-1] < model.losses[0] and len(run.optimizers[0].param_groups) == 1
    assert run.optimizers[0].state


def test_a_users_function_maps_the_state(tmp_path: Path) -> None:
    asked: list[Any] = []

    def keep(op: Any, optimizer: Any, states: Any, grown: Any) -> Any:
        asked.append((sorted(states[0]) == sorted(grown), type(optimizer).__name__))
        return {name: {"step": torch.tensor(1.0), "ax": torch.zeros_like(p), "mu": torch.ones(()), "eta": torch.ones(()) / 9}
                for name, p in grown.items()}  # fmt: skip

    fit(make(optimizer="asgd"), tmp_path, grow(6, optimizer_state=keep), max_epochs=2)
    assert asked == [(True, "ASGD")]


# ------------------------------------------------------------------ copies, repetitions, traces


def test_copies_and_pickles_of_the_module(tmp_path: Path) -> None:
    copies: list[Any] = []

    def look(run: pl.Trainer, module: pl.LightningModule) -> None:
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert same_tensors(dict(twin.state_dict()), dict(module.state_dict()))
            copies.append(twin)

    model = make()
    fit(model, tmp_path, grow(4), Watch(look))
    for twin in (copies[0], copies[-1], copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fit(twin, tmp_path / "x", max_epochs=1)


def traces(model: pl.LightningModule, optimizers: Any) -> list[Any]:
    hooks = [
        list(m._forward_hooks) + list(m._forward_pre_hooks) + list(m._load_state_dict_pre_hooks) for m in model.modules()
    ]
    hooks += [list(o._optimizer_step_pre_hooks) + list(o._optimizer_step_post_hooks) for o in optimizers]
    hooks += [list(o._optimizer_state_dict_pre_hooks) for o in optimizers]
    return [hook for found in hooks for hook in found]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_nothing_is_left_behind(stage: str, tmp_path: Path) -> None:
    model = make()
    run = trainer(tmp_path, grow(4))
    getattr(run, stage)(model)
    assert not traces(model, run.optimizers)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_nothing_is_left_behind_after_an_error(step: int, tmp_path: Path) -> None:
    def raise_at(run: pl.Trainer, module: Any) -> None:
        if run.global_step == step:
            raise ArithmeticError

    model = make()
    run = trainer(tmp_path, grow(4), Watch(raise_at))
    with pytest.raises(ArithmeticError):
        run.fit(model)
    assert not traces(model, run.optimizers)


def test_the_old_parameters_are_freed(tmp_path: Path) -> None:
    model = make()
    old = weakref.ref(model.net[0].weight)
    fit(model, tmp_path, grow(4))
    gc.collect()
    assert old() is None


def test_fit_twice_goes_on(tmp_path: Path) -> None:
    model = make()
    run = trainer(tmp_path, grow(4))
    run.fit(model)
    weight = model.net[0].weight
    run.fit_loop.max_epochs = 4
    run.fit(model)
    assert model.net[0].weight is weight and len(model.losses) == 16
    trainer(tmp_path, run.callbacks[0], max_epochs=1).fit(model)  # in another Trainer, too
    assert model.net[0].weight is weight


def test_another_module_grows_again(tmp_path: Path) -> None:
    event = grow(4)
    first, second = make(), make()
    trainer(tmp_path, event).fit(first)
    trainer(tmp_path, event).fit(second)
    assert first.losses == second.losses
    assert same_tensors(dict(first.state_dict()), dict(second.state_dict()))


def test_an_earlier_checkpoint_in_the_same_process(tmp_path: Path) -> None:
    """The grown module becomes small again, and grows as before."""
    model = make()
    run = trainer(tmp_path, grow(6), every_epoch(tmp_path), max_epochs=3)
    run.fit(model)
    losses, state = list(model.losses), copy.deepcopy(model.state_dict())
    again = trainer(tmp_path, run.callbacks[0], max_epochs=3)
    with pytest.warns(UserWarning, match="Be aware that when using"):
        again.fit(model, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert model.losses[len(losses) :] == losses[4:]
    assert same_tensors(dict(model.state_dict()), dict(state))


class Layers(Growable):
    """Residual layers, as many as asked for."""

    def __init__(self, depth: int = 1, width: int = 8, fixed: bool = False) -> None:
        super().__init__(width)
        blocks = [Residual(width) for _ in range(depth)]
        self.net = nn.Sequential(nn.Linear(10, width), nn.Sequential(*blocks), nn.Linear(width, 5))
        self.made = None if not fixed else self.optimizers_of_two_groups()

    def optimizers_of_two_groups(self) -> Any:
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0}
        return torch.optim.AdamW([{"params": decay}, rest], lr=1e-2)

    def configure_optimizers(self) -> Any:
        return self.made or self.optimizers_of_two_groups()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.outer(F.relu(self.inner(inputs)))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("fixed", [False, True], ids=["configured", "from-outside"])
def test_new_blocks_are_trained(fixed: bool, tmp_path: Path) -> None:
    """Growth in depth: their parameters join the groups of their kind, and a run resumes on either side."""
    event = DeepFusionGrow(grown={"depth": 3, "width": 16}, schedule=AtStep(6), verbose=False)
    full, plain = seeded(Layers, fixed=fixed), seeded(Layers, fixed=fixed)
    whole = fit(full, tmp_path, event, every_epoch(tmp_path), max_epochs=4)
    fit(plain, tmp_path / "plain", max_epochs=4)
    assert full.losses[6] == pytest.approx(plain.losses[6], rel=1e-4)
    decay, rest = (group["params"] for group in whole.optimizers[0].param_groups)
    assert [id(p) for p in decay] == [id(p) for p in full.parameters() if p.dim() > 1]
    assert [id(p) for p in rest] == [id(p) for p in full.parameters() if p.dim() == 1]
    assert len(full.net[1]) == 3 and all(block.outer.weight.any() for block in full.net[1])
    for epoch in (0, 2):
        part = seeded(Layers, fixed=fixed)
        run = fit(part, tmp_path / "x", event, every_epoch(tmp_path), max_epochs=4, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert part.losses == full.losses[4 * (epoch + 1) :]
        assert same_tensors(dict(part.state_dict()), dict(full.state_dict()))
        assert same_tensors(run.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
