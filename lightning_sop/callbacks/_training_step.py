"""Calling a module's ``training_step`` as Lightning does, and reading its loss."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

_KNOWN = ("current_epoch", "global_step", "global_rank", "local_rank")
"""What Lightning's modules read from their Trainer, and silently take to be 0 without one."""


def call_step(trainer: Trainer | None, module: LightningModule, batch: Any, index: int) -> Any:
    """What ``training_step`` returns; it may take the batch alone, or its index, too.

    Args:
        trainer: of the run, if the module is in one or a copy from one.
        module: whose step it is.
        batch: of the run.
        index: of the batch.
    """
    with knowing(trainer, module):
        if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
            return module.training_step(batch, index)
        return module.training_step(batch)


@contextmanager
def knowing(trainer: Trainer | None, module: LightningModule) -> Iterator[None]:
    """Meanwhile a copy of a run's module knows the run's epoch, step and rank, which are 0 without a Trainer."""
    if trainer is None:
        yield
        return
    known = {name: property(_constantly(getattr(trainer, name))) for name in _KNOWN}
    parts = [part for part in module.modules() if isinstance(part, LightningModule) and part._trainer is None]
    classes = [type(part) for part in parts]
    try:
        for part, cls in zip(parts, classes, strict=True):
            part.__class__ = _informed(cls, known)
        yield
    finally:
        for part, cls in zip(parts, classes, strict=True):
            part.__class__ = cls


def _informed(cls: type, known: Mapping[str, Any]) -> type:
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **known}
    return types.new_class(cls.__name__, (_Unannounced, cls), exec_body=lambda namespace: namespace.update(own))


class _Unannounced:
    """Comes before a user's class among the bases of another one: what that does with its subclasses is not for ours."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def _constantly(value: int) -> Callable[[object], int]:
    return lambda _: value


def loss_of(trainer: Trainer | None, module: LightningModule, batch: Any, index: int) -> Tensor:
    """The loss of a training step.

    Raises:
        TypeError: it gives none.
    """
    loss = loss_if_any(trainer, module, batch, index)
    if loss is None:
        raise TypeError("training_step returns NoneType, not a loss")
    return loss


def loss_if_any(trainer: Trainer | None, module: LightningModule, batch: Any, index: int) -> Tensor | None:
    """The loss of a training step; None for a step that Lightning would leave out.

    Raises:
        TypeError: it gives something else.
    """
    result = call_step(trainer, module, batch, index)
    loss = result["loss"] if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor | None):
        raise TypeError(f"training_step returns {type(loss).__name__}, not a loss")
    return loss
