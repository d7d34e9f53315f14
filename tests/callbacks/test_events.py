"""What users do around and inside a fit."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop import MajorityKernels, Rule, SimulatedOverparam
from lightning_sop.reparam import TrainingForm
from tests.callbacks.helpers import Classifier, InConfigureModel, InSetup, fit, overparam, same_tensors, seeded, trainer


def kernels_of(run: pl.Trainer, name: str = "net.0.weight") -> Tensor:
    """The stack of kernels of a weight after a run."""
    return next(c for c in run.callbacks if isinstance(c, SimulatedOverparam)).engine.forms[name].storage[0]


def mean_of(run: pl.Trainer, name: str = "net.0.weight") -> Tensor:
    return kernels_of(run, name).mean(0)


@pytest.mark.parametrize("make", [Classifier, InSetup, InConfigureModel])
def test_fit_validate_test_predict(make: Any, tmp_path: Path) -> None:
    model = seeded(make)
    run = fit(model, tmp_path, overparam(3), ModelCheckpoint(tmp_path, monitor="val_loss"))
    torch.testing.assert_close(model.net[0].weight, mean_of(run))
    before = copy.deepcopy(model.state_dict())
    [validated] = run.validate(model, verbose=False)
    [tested] = run.test(model, ckpt_path="best", verbose=False, weights_only=True)
    predicted = run.predict(model)
    assert predicted is not None and set(validated) == set(tested) == {"val_loss"}
    assert before.keys() == model.state_dict().keys()


def test_test_and_predict_use_the_weights_that_are_loaded(tmp_path: Path) -> None:
    """Outside fit the loaded weights are authoritative."""
    model = seeded(Classifier)
    run = fit(model, tmp_path, overparam(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    [outputs] = {tuple(batch.abs().sum(1).tolist()) for batch in run.predict(model)[:1]}
    assert set(outputs) == {0.0}
    assert all(not p.any() for p in model.parameters())


def test_fit_twice_goes_on(tmp_path: Path) -> None:
    model = seeded(Classifier)
    run = trainer(tmp_path, overparam(3))
    run.fit(model)
    first = kernels_of(run).clone()
    weights = copy.deepcopy(model.state_dict())
    run.fit_loop.max_epochs = 4
    run.fit(model)
    assert len(model.losses) == 16
    spread = lambda k: k - k.mean(0)  # noqa: E731
    assert F.cosine_similarity(spread(first).flatten(), spread(kernels_of(run)).flatten(), dim=0) > 0.5
    assert not same_tensors(dict(weights), dict(model.state_dict()))


def test_weights_written_between_two_fits_are_trained_on(tmp_path: Path) -> None:
    model = seeded(Classifier)
    run = trainer(tmp_path, overparam(3), max_epochs=1)
    run.fit(model)
    with torch.no_grad():
        model.net[4].weight.fill_(0.25)
    trainer(tmp_path, run.callbacks[0], max_epochs=0).fit(model)
    torch.testing.assert_close(model.net[4].weight, torch.full((5, 32), 0.25))
    third = trainer(tmp_path, run.callbacks[0], max_epochs=1)
    model.lr = 0.0
    third.fit(model)
    torch.testing.assert_close(model.net[4].weight, torch.full((5, 32), 0.25))


def test_another_model_gets_its_own_kernels(tmp_path: Path) -> None:
    callback = overparam(3)
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(Classifier))
    first = callback.engine
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(Classifier))
    assert callback.engine is not first


def test_pretrained_weights_loaded_in_on_fit_start(tmp_path: Path) -> None:
    class Pretrained(Classifier):
        def on_fit_start(self) -> None:
            with torch.no_grad():
                self.net[4].weight.copy_(torch.full((5, 32), 0.125))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = seeded(Pretrained)
    run = fit(model, tmp_path, overparam(3))
    torch.testing.assert_close(model.net[4].weight, torch.full((5, 32), 0.125))
    assert kernels_of(run, "net.4.weight").std() > 0.01


class Writer(Callback):
    """Writes a weight in some way, in some hook."""

    def __init__(self, hook: str, how: str) -> None:
        setattr(self, hook, self.write)
        self.how = how
        self.expected: Tensor | None = None

    def write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        weight = pl_module.net[4].weight
        if self.how == "load_state_dict":
            state = {name: torch.full_like(t, 0.5) for name, t in pl_module.net[4].state_dict().items()}
            pl_module.net[4].load_state_dict(state)
        elif self.how == "data":
            weight.data += 1.0
        else:
            with torch.no_grad():
                weight.add_(1.0)


@pytest.mark.parametrize(
    "hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step"]
)
@pytest.mark.parametrize("how", ["no_grad", "data", "load_state_dict"])
@pytest.mark.parametrize("first", [True, False])
def test_weights_written_by_others_move_the_mean(hook: str, how: str, first: bool, tmp_path: Path) -> None:
    class Still(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = seeded(Still)
    start = model.net[4].weight.detach().clone()
    callbacks = [Writer(hook, how), overparam(3)]
    run = trainer(tmp_path, *(callbacks if first else callbacks[::-1]), max_epochs=1, limit_train_batches=1)
    run.fit(model)
    expected = torch.full_like(start, 0.5) if how == "load_state_dict" else start + 1
    torch.testing.assert_close(model.net[4].weight.detach(), expected)


def test_weight_clipping_through_data_holds_every_step(tmp_path: Path) -> None:
    """As in Wasserstein GANs."""

    class Clip(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            pl_module.net[0].weight.data.clamp_(-0.05, 0.05)

    model = seeded(Classifier)
    fit(model, tmp_path, SimulatedOverparam(MajorityKernels(3, init="spread", spread=0.0), verbose=False), Clip())
    assert model.net[0].weight.abs().max() < 0.08  # the plain run, too, ends with a last step behind the last clip


@pytest.mark.parametrize("restore", [True, False])
def test_generation_with_eval_inside_hooks(restore: bool, tmp_path: Path) -> None:
    """eval() gives the deployable network, train() the training one; a pending backward is not disturbed."""

    class Sampling(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            mixed = self.net[0].weight.detach().clone()
            self.eval()
            with torch.no_grad():
                self(batch[0])
            form = self.net[0].weight_form
            torch.testing.assert_close(self.net[0].weight.detach(), form.storage[0].mean(0))
            assert not torch.equal(mixed, self.net[0].weight)
            self.train()
            assert torch.equal(mixed, self.net[0].weight)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            self.eval()
            with torch.no_grad():
                self(torch.zeros(2, 10))
            if restore:
                self.train()

    sampling, quiet = seeded(Sampling, dropout=0.0), seeded(Classifier, dropout=0.0)
    for model in (sampling, quiet):
        model.net[1] = nn.Identity()  # no statistics that a forward in the other mode could change
    fit(sampling, tmp_path, overparam(3, seed=1))
    fit(quiet, tmp_path, overparam(3, seed=1))
    assert sampling.losses == quiet.losses


def test_a_model_that_stays_in_eval_mode_is_mixed(tmp_path: Path) -> None:
    """Fine-tuning without dropout: modules from libraries often come in eval mode."""
    model = seeded(Classifier)
    model.eval()
    seen = set()

    class Look(Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.add((pl_module.net[0].training, pl_module.net[0].weight_form.mixed))

        def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            assert not pl_module.net[0].weight_form.mixed

    fit(model, tmp_path, overparam(3), Look())
    assert seen == {(False, True)}


class Interrupted(Exception):
    """Planted."""


class Breaking(torch.optim.SGD):
    """Raises in the middle of its arithmetic, once."""

    fuse = 2
    error: type[BaseException] = Interrupted

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for group in self.param_groups:
                for index, parameter in enumerate(group["params"]):
                    if index == 2:
                        Breaking.fuse -= 1
                        if Breaking.fuse == 0:
                            raise Breaking.error
                    parameter.add_(parameter.grad, alpha=-1e-2)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_an_exception_inside_a_step(error: type[BaseException], tmp_path: Path) -> None:
    class Fragile(Classifier):
        def configure_optimizers(self) -> Any:
            self.made = Breaking(self.parameters(), lr=1e-2)
            return self.made

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    Breaking.fuse, Breaking.error = 2, error
    model = seeded(Fragile)
    held = [id(p) for p in model.parameters()]
    run = trainer(tmp_path, overparam(3), ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=0, monitor=None))
    with pytest.raises((error, SystemExit)):
        run.fit(model)
    signal.signal(signal.SIGINT, handler)
    assert [id(p) for group in model.made.param_groups for p in group["params"]] == held
    assert all(id(p) in held for p in model.made.state)
    assert not any(isinstance(m, TrainingForm) for m in model.modules())
    torch.testing.assert_close(model.net[0].weight, mean_of(run))
    run.fit(model)  # and the same objects train on
    assert len(model.losses) == 8 + 2


def test_ctrl_c_between_steps(tmp_path: Path) -> None:
    class Press(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    model = seeded(Classifier)
    run = trainer(tmp_path, overparam(3), Press())
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run.fit(model)
    signal.signal(signal.SIGINT, handler)
    torch.testing.assert_close(model.net[0].weight, mean_of(run))
    assert not any(isinstance(m, TrainingForm) for m in model.modules())


def test_momentum_network(tmp_path: Path) -> None:
    """A target network that no optimizer holds is left to its writer, bit for bit."""

    class Momentum(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.target = copy.deepcopy(self.net)
            self.shadow: list[Tensor] = []

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=1e-2)

        def on_train_batch_end(self, *_: Any) -> None:
            for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
                slow.data = 0.9 * slow.data + 0.1 * fast.data
            self.shadow.append(self.target[0].weight.detach().clone())

        def on_train_batch_start(self, *_: Any) -> None:
            if self.shadow:
                assert torch.equal(self.target[0].weight, self.shadow[-1])

    model = seeded(Momentum)
    run = fit(model, tmp_path, overparam(3))
    assert torch.equal(model.target[0].weight, model.shadow[-1])
    engine = run.callbacks[0].engine
    assert not engine.forms["target.0.weight"].built and engine.forms["net.0.weight"].built


@pytest.mark.parametrize("when", ["before", "inside"])
def test_deepcopy_and_pickle_of_the_module(when: str, tmp_path: Path) -> None:
    copies: list[pl.LightningModule] = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            state = pl_module.state_dict()
            for twin in (copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))):
                assert same_tensors(dict(twin.state_dict()), dict(state))
                twin.eval()
                assert same_tensors(dict(twin.state_dict(keep_vars=False)), dict(state))
                assert torch.equal(twin.net[0].weight, state["net.0.weight"])
                copies.append(twin)

    model = seeded(Classifier)
    if when == "before":
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    fit(model, tmp_path, overparam(3), Copy())
    twin = copies[0]
    fit(twin, tmp_path, overparam(3))  # a copy can be trained on, plainly or with us
    fit(copies[1], tmp_path)


def test_rules_give_layers_different_methods(tmp_path: Path) -> None:
    rules = [Rule(MajorityKernels(2), include=["net.0"]), Rule(None, include=["net.4"]), Rule(MajorityKernels(5))]
    model = seeded(Classifier)
    run = fit(model, tmp_path, SimulatedOverparam(rules=rules, verbose=False))
    forms = run.callbacks[0].engine.forms
    assert {name: len(form.phi) for name, form in forms.items()} == {"net.0.weight": 2}


def test_two_callbacks_on_different_layers(tmp_path: Path) -> None:
    one, two = overparam(2, include=["net.0"]), overparam(4, include=["net.4"])
    model = seeded(Classifier, shuffle=False, dropout=0.0)
    run = fit(model, tmp_path, one, two, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), max_epochs=4)
    assert kernels_of(run).shape[0] == 2
    again = seeded(Classifier, shuffle=False, dropout=0.0)
    more = [one, two, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)]
    fit(again, tmp_path / "x", *more, ckpt=tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert again.losses == model.losses[8:]


def test_two_callbacks_on_one_layer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'net.0.weight' is in a training form already"):
        fit(seeded(Classifier), tmp_path, overparam(2), overparam(4, include=["net.0"]))


@pytest.mark.parametrize(("epochs", "steps"), [(4, -1), (-1, 16), (4, 1000), (100, 16)])
def test_annealing_ends_at_the_mean(epochs: int, steps: int, tmp_path: Path) -> None:
    """The end is that of the steps or of the epochs, whichever comes first."""
    mixes = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            mixes.append(pl_module.net[0].weight_form.mix)

    callback = SimulatedOverparam(MajorityKernels(4, anneal=0.5), verbose=False)
    fit(seeded(Classifier), tmp_path, callback, Look(), max_epochs=epochs, max_steps=steps)
    assert len(mixes) == 16
    distance = [float((mix - 0.25).abs().max()) for mix in mixes]
    assert max(distance[:7]) > 0.05 and distance[-1] < 0.25 / 8


def test_a_training_of_unknown_length_is_not_annealed_and_says_so(tmp_path: Path) -> None:
    found: dict[float, list[float]] = {}

    class Stop(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            form = pl_module.net[0].weight_form
            found[form.method.anneal] = form.mix.tolist()
            trainer.should_stop = trainer.global_step == 3

    def run(anneal: float) -> None:
        callback = SimulatedOverparam(MajorityKernels(4, anneal=anneal), verbose=False)
        fit(seeded(Classifier), tmp_path, callback, Stop(), max_epochs=-1)

    with pytest.warns(UserWarning, match="set max_steps, .* or anneal=0") as caught:
        run(1.0)
    assert len([warning for warning in caught if "annealing needs" in str(warning.message)]) == 1
    run(0.0)
    assert found[1.0] == found[0.0]


def test_table_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich, "_console", Console(width=160))
    fit(seeded(Classifier), tmp_path, SimulatedOverparam(MajorityKernels(3), verbose=True))
    text = capsys.readouterr().out
    assert text.count("Simulated over-parametrization") == 1
    assert "net.0.weight" in text and "layer type BatchNorm1d is not asked for" in text


def test_frozen_weights_in_an_optimizer_stay_untouched(tmp_path: Path) -> None:
    """``Adam(self.parameters())`` holds a frozen backbone, too; mixing must not disturb it."""

    class Backbone(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].weight.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.net[4].weight.requires_grad_(self.current_epoch == 0)  # and one that is frozen after the first epoch

        def on_after_backward(self) -> None:
            assert self.net[4].weight_form.mixed == (self.current_epoch == 0)

    model = seeded(Backbone)
    before = model.net[0].weight.detach().clone()
    run = fit(model, tmp_path, overparam(3))
    assert torch.equal(model.net[0].weight, before)
    torch.testing.assert_close(model.net[4].weight.detach(), mean_of(run, "net.4.weight"))


def test_channels_last(tmp_path: Path) -> None:
    class Convolution(Classifier):
        def __init__(self) -> None:
            super().__init__(shuffle=False)
            self.net = nn.Sequential(
                nn.Unflatten(1, (1, 2, 5)), nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(40, 5)
            )

    losses = []
    for last in (True, False):
        model = seeded(Convolution)
        if last:
            model = model.to(memory_format=torch.channels_last)
        run = trainer(tmp_path, overparam(3, seed=1))
        run.fit(model)
        model.to(memory_format=torch.channels_last)
        run.fit_loop.max_epochs = 3
        run.fit(model)
        losses.append(model.losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
