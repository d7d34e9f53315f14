"""What is measured when a network grows: losses on both sides, and what the optimizers remember."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lightning_sop.callbacks._growing import networks_of
from lightning_sop.callbacks._growing_shape import growing
from lightning_sop.callbacks._monitor_losses import Losses
from lightning_sop.callbacks._monitor_measure import state_totals

if TYPE_CHECKING:
    from lightning_sop.callbacks.deep_fusion_grow import DeepFusionGrow

Guarded = Callable[[Callable[[], None]], None]
Told = Callable[[Trainer, dict[str, float]], None]


class Seams:
    """Looks at every growth of a run from before and after, until :meth:`close`.

    Args:
        trainer: of the run.
        wanted: names of quantities.
        losses: that evaluates on copies.
        guarded: runs what must not stop the run.
        told: gets the numbers of each growth.
    """

    def __init__(self, trainer: Trainer, wanted: set[str], losses: Losses, guarded: Guarded, told: Told) -> None:
        self._wanted, self._losses, self._guarded, self._told = wanted, losses, guarded, told
        self._found: dict[str, float] = {}  # of the growth under way
        self._events = growing(trainer)
        for event in self._events:
            event.observers.append(self)

    def close(self) -> None:
        """The events are as they were."""
        for event in self._events:
            event.observers.remove(self)
        self._events = []

    def before_growth(self, event: DeepFusionGrow, trainer: Trainer, batch: Any, index: int) -> None:
        """Measure the donors."""
        self._found = {}
        self._guarded(lambda: self._before(event, trainer, batch, index))

    def after_growth(self, event: DeepFusionGrow, trainer: Trainer, batch: Any, index: int) -> None:
        """Measure what has become of them, and tell."""
        self._guarded(lambda: self._after(trainer, batch, index))
        self._guarded(lambda: self._told(trainer, self._found))

    def _before(self, event: DeepFusionGrow, trainer: Trainer, batch: Any, index: int) -> None:
        self._remembered(trainer, "_before_growth")
        if "growth/donor_loss" in self._wanted:
            networks = networks_of(event.loaded, trainer.lightning_module)
            donors = {name: networks[name] for name in dict.fromkeys(event.donors)}
            losses = self._losses.of(trainer, donors, batch, index)
            names = _short(list(losses))
            self._found |= {f"growth/donor_loss/{names[name]}": value for name, value in losses.items()}
            if losses:
                self._found["growth/donor_loss"] = sum(losses.values()) / len(losses)

    def _after(self, trainer: Trainer, batch: Any, index: int) -> None:
        self._remembered(trainer, "_after_growth")
        if "growth/fused_loss" in self._wanted:
            self._found |= self._losses.of(trainer, {"growth/fused_loss": trainer.lightning_module}, batch, index)
        if "growth/event" in self._wanted:
            self._found["growth/event"] = float(sum(event.grown_at is not None for event in growing(trainer)))

    def _remembered(self, trainer: Trainer, suffix: str) -> None:
        if f"optimizer/{{entry}}{suffix}" in self._wanted and trainer.is_global_zero:
            self._found |= state_totals(trainer.optimizers, suffix)


def _short(paths: list[str]) -> dict[str, str]:
    """Donors by the names of their files, with a number where two have the same."""
    names: dict[str, str] = {}
    for path in paths:
        stem = PurePath(path).stem
        twins = sum(name == stem or name.startswith(f"{stem}_") for name in names.values())
        names[path] = f"{stem}_{twins + 1}" if twins else stem
    return names
