"""The engines that are training at present, and the steps of any optimizer, by which they find theirs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from lightning_sop.reparam.engine import Engine

_live: weakref.WeakSet[Engine] = weakref.WeakSet()
_discovery: RemovableHandle | None = None


def live_engines() -> list[Engine]:
    """The engines that are training at present."""
    return list(_live)


def add(engine: Engine) -> None:
    """From now on an engine hears of optimizers that hold its weights."""
    _live.add(engine)
    _listen()


def discard(engine: Engine) -> None:
    """And from now on no more."""
    _live.discard(engine)
    _listen()


def _discover(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before any optimizer's step: hook the optimizers that hold weights in training form, also ones nested in others."""
    for engine in live_engines():
        held = engine.held_by(optimizer)
        if held:
            engine.cycle_of(optimizer).innermost(held)


def _listen() -> None:
    """The process-wide hook exists exactly while an engine is live."""
    global _discovery
    if _live and _discovery is None:
        _discovery = register_optimizer_step_pre_hook(_discover)
    elif not _live and _discovery is not None:
        _discovery.remove()
        _discovery = None
