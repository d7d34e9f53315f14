"""When to grow."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lightning_sop.growth.evidence import Evidence, Laboratory


@dataclass(frozen=True)
class Moment:
    """A point of a run, between two optimizer steps.

    Attributes:
        step: optimizer steps done.
        total: optimizer steps planned, or None where that is not known.
        metrics: what the run has logged last, by name.
    """

    step: int
    total: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Schedule(ABC):
    """Says at each optimizer step whether the network grows now; its state is plain data, saved with the run."""

    @abstractmethod
    def due(self, moment: Moment) -> bool:
        """Whether to grow before the next step. Asked once a step, on every rank alike."""

    def observe(self, moment: Moment) -> None:  # noqa: B027  # most schedules need no metrics
        """New metrics: called after each validation."""

    def wants(self, moment: Moment) -> int:
        """How many training batches :meth:`consider` takes at this step; for 0 it is not called. Asked once a step."""
        return 0

    def consider(self, laboratory: Laboratory, moment: Moment) -> Evidence | None:
        """Look at the run as it is, between two steps, before :meth:`due` is asked; called at steps that want batches.

        Args:
            laboratory: for trying growth out on copies. Where the training data cannot be read beside the run, its batches
                are the run's next ones, kept until there are as many as wanted: then this is called so much later.
            moment: where the run is.

        Returns:
            What was measured, to be logged; None where nothing was.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  # most schedules have none
        """Continue from :meth:`state_dict`."""


class AtStep(Schedule):
    """Grow once this many optimizer steps are done; 0 is before the first.

    Args:
        step: number of optimizer steps.
    """

    def __init__(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"AtStep: step must be a whole number, 0 or more, not {step!r}")
        self.step = step

    def due(self, moment: Moment) -> bool:
        return moment.step >= self.step


class AtFraction(Schedule):
    """Grow after this part of the planned optimizer steps.

    Args:
        fraction: from 0 (before the first step) to less than 1.
    """

    def __init__(self, fraction: float) -> None:
        if not 0 <= fraction < 1:
            raise ValueError(f"AtFraction: fraction must be in [0, 1), not {fraction!r}")
        self.fraction = fraction

    def due(self, moment: Moment) -> bool:
        if moment.total is None:
            raise ValueError(
                "AtFraction needs to know the length of the run: set max_steps, or max_epochs with data of known length"
            )
        return moment.step >= self.fraction * moment.total


class OnPlateau(Schedule):
    """Grow when a metric has stopped improving.

    Args:
        monitor: name of the logged metric.
        mode: ``"min"`` or ``"max"``.
        patience: observations (validations) without improvement that are waited for.
        min_delta: the least change that counts as improvement.
        min_steps: optimizer steps before which it never grows.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        min_steps: int = 0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"OnPlateau: mode must be 'min' or 'max', not {mode!r}")
        if patience < 1:
            raise ValueError(f"OnPlateau: patience must be at least 1, not {patience!r}")
        self.monitor, self.mode, self.patience, self.min_delta, self.min_steps = (
            monitor,
            mode,
            patience,
            min_delta,
            min_steps,
        )
        self._best = math.inf
        self._waited = 0

    def observe(self, moment: Moment) -> None:
        if self.monitor not in moment.metrics:
            logged = ", ".join(sorted(moment.metrics)) or "no metrics"
            raise ValueError(f"OnPlateau: {self.monitor!r} was not logged; there are {logged}")
        value = moment.metrics[self.monitor] * (1 if self.mode == "min" else -1)
        if value < self._best - self.min_delta:
            self._best, self._waited = value, 0
        else:
            self._waited += 1

    def due(self, moment: Moment) -> bool:
        return self._waited >= self.patience and moment.step >= self.min_steps

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._waited = state["best"], state["waited"]
