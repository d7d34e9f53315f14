"""Outside ``optimizer.step()`` everybody sees the plain network: asserted from every hook that Lightning has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.callbacks.helpers import Classifier, Manual, fit, overparam, seeded

HOOKS = sorted(name for name in dir(Callback) if name.startswith("on_") and name not in ("on_load_checkpoint",))


class Watch(Callback):
    """Records, in every hook, whether the optimizers and the parameters are the plain model's."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.plain: list[str] = []

    def look(self, hook: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen[hook] = self.seen.get(hook, 0) + 1
        names = [name for name, _ in pl_module.named_parameters()]
        assert names == self.plain, hook
        assert list(pl_module.state_dict()) == list(seeded(type(pl_module)).state_dict()), hook
        known = {id(p) for p in pl_module.parameters()}
        for optimizer in trainer.optimizers:
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            assert len(held) == len(set(held)) and set(held) <= known, hook
            assert {id(p) for p in optimizer.state} <= set(held), hook
            for parameter, state in optimizer.state.items():
                for value in state.values():
                    assert not isinstance(value, torch.Tensor) or value.shape in ((), parameter.shape), hook
            assert set(optimizer.state_dict()["state"]) <= set(range(len(held))), hook


def _add(hook: str) -> None:
    def method(self: Watch, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        self.look(hook, trainer, pl_module)

    setattr(Watch, hook, method)


for _hook in HOOKS:
    _add(_hook)


@pytest.mark.parametrize("make", [Classifier, Manual], ids=["automatic", "manual"])
@pytest.mark.parametrize("first", [True, False], ids=["watched_first", "watched_last"])
def test_every_hook_sees_the_plain_network(make: Any, first: bool, tmp_path: Path) -> None:
    model = seeded(make)
    watch = Watch()
    watch.plain = [name for name, _ in model.named_parameters()]
    callbacks = [watch, overparam(3)] if first else [overparam(3), watch]
    run = fit(model, tmp_path, *callbacks, ModelCheckpoint(tmp_path))
    seen = next(c for c in run.callbacks if isinstance(c, Watch)).seen
    for hook in (
        "on_train_batch_end",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_save_checkpoint",
        "on_validation_end",
    ):
        assert seen.get(hook), f"{hook} was never called"


def test_gradients_stay_readable_after_the_step(tmp_path: Path) -> None:
    """Loggers read them in on_train_batch_end."""

    class Norms(Callback):
        norms: list[float] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            self.norms.append(pl_module.net[0].weight.grad.norm().item())

    fit(seeded(Classifier), tmp_path, overparam(3), Norms())
    assert len(Norms.norms) == 8 and all(norm > 0 for norm in Norms.norms)


def test_the_module_is_plain_after_fit(tmp_path: Path) -> None:
    model = seeded(Classifier)
    before = [name for name, _ in model.named_modules()]
    hooks = {key for key in model.__dict__ if key in ("setup", "configure_model")}
    fit(model, tmp_path, overparam(3))
    assert [name for name, _ in model.named_modules()] == before
    assert {key for key in model.__dict__ if key in ("setup", "configure_model")} == hooks


def test_print_shows_what_is_trained(tmp_path: Path) -> None:
    class Show(Callback):
        text = ""

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            Show.text = str(pl_module)

    fit(seeded(Classifier), tmp_path, overparam(3), Show())
    assert "(weight_form): MajorityKernels(weight (32, 10) <- (3, 32, 10))" in Show.text
