"""TrainingCost: FLOPs and wall time of a run, in its logs and checkpoints."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_sop.callbacks._batch_cost import BatchCost, elements, shapes_of
from lightning_sop.callbacks._cost_table import conclusion, summary
from lightning_sop.callbacks._growing_shape import growing
from lightning_sop.callbacks._strategies import refuse_other_lightning
from lightning_sop.callbacks._terminal import show
from lightning_sop.callbacks._wandb_runs import describe_run
from lightning_sop.dynamics.cost import GROWTH, VALIDATION, Clock, Ledger, Phase, stage_name

FORMAT = 1


class TrainingCost(Callback):
    """Count what a run costs: FLOPs of forward and backward, and wall time. The run is left as it is.

    The FLOPs of a batch are counted with a training step on a copy of the module, once for each shape of network and
    batch (a step that does something else in later epochs counts as its first one did), and added up batch by batch; those
    of all ranks are taken to be those of the rank times their number. Where ``training_step`` needs its Trainer, or steps
    its optimizers itself, it is listened to once, and each call of a network counts three times its forward. What optimizers
    and validation compute is not counted.

    Seconds are those of the first rank, from a monotonic clock, from one batch to the next: they include waiting for data,
    other callbacks and saving, and not validation, the checks and the growth of :class:`~lightning_sop.DeepFusionGrow`, or
    the counting itself, which are phases of their own. No device is waited for.

    Logged are ``cost/flops``, ``cost/seconds`` and ``cost/batches``, of training alone, and in runs that grow ``growth/…``
    (docs/methods/deep_fusion.md). The state is in the checkpoint: a resumed run goes on counting. ``DeepFusionGrow`` brings
    this callback along, if it is not there.

    Args:
        verbose: print a table at the end of fit; default on a terminal or in a notebook.

    Attributes:
        ledger: everything that was counted.
        batch_cost: FLOPs of a batch.
    """

    def __init__(self, verbose: bool | None = None) -> None:
        self.verbose = verbose
        self._network: weakref.ref[LightningModule] | None = None
        self._begin()

    def _begin(self) -> None:
        self.ledger = Ledger()
        self._clock = Clock(self.ledger)
        self.batch_cost = BatchCost(self._clock)
        self._before = math.nan  # FLOPs of a batch over its elements, before the latest growth
        self._seen = self._steps = self._logged = self._passes = 0
        self._growing = False

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickled ones begin a count of their own.
        return {**self.__dict__, **dict.fromkeys(("ledger", "batch_cost", "_clock", "_network"))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def flops(self) -> float:
        """Of the training so far; NaN where they cannot be counted."""
        return self.ledger.training().flops

    @property
    def flops_spent(self) -> float:
        """With the checks of a growth schedule and the growth itself, without donors."""
        return self.ledger.spent().flops

    @property
    def seconds(self) -> float:
        """Of the training so far."""
        self._clock.lap()
        return self.ledger.training().seconds

    @property
    def batches(self) -> int:
        """That were trained on."""
        return self.ledger.training().batches

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Another network is another count."""
        if stage == "fit":
            refuse_other_lightning(pl_module, "TrainingCost")
            if self._network is not None and self._network() is not pl_module:
                self._begin()
            self._network = weakref.ref(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        events, counted = growing(trainer), self.ledger.since + self.ledger.training().steps
        self._growing = bool(events)
        if counted < trainer.global_step:
            rank_zero_info(f"TrainingCost: nothing is known of the cost of steps {counted} to {trainer.global_step}.")
            self.ledger.since += trainer.global_step - counted
        for _ in range(sum(event.grown_at is not None for event in events) - self.ledger.stage):
            self.ledger.factors.append(1.0)  # in a run before this one, which did not count
        self._seen, self._steps, self._logged, self._passes = _processed(trainer), trainer.global_step, -1, 0
        self.batch_cost.renew()
        describe_run(trainer, self)
        self._clock.start(stage_name(self.ledger.stage))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Parameters may be frozen or not in another epoch."""
        self.batch_cost.renew()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the FLOPs of a batch of a new shape."""
        self.batch_cost.before(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Some optimizers compute a batch more than once."""
        self._passes += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch; log."""
        self._settle(trainer, pl_module, batch, batch_idx)
        if _due(trainer):
            self._log(trainer, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, at the epoch's last step."""
        self._log(trainer, -1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no training."""
        self._clock.enter(VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on."""
        self._clock.leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._leave()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what it came to."""
        show(trainer, self.verbose, summary(self.ledger), *[conclusion(self.ledger)] * (self.ledger.stage > 0))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind; no teardown follows."""
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._leave()

    def _leave(self) -> None:
        self._clock.stop()
        self.batch_cost.close()

    def _settle(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        """Add the batch that is done, if that has not been done."""
        done, steps = _processed(trainer), trainer.global_step
        if done == self._seen:
            return
        if batch is not None:
            passes = max(1, self._passes) if module.automatic_optimization else 1
            cost = self.batch_cost.after(trainer, module, batch, index, passes)
            spent = Phase(steps - self._steps, 1, cost.flops * passes * trainer.world_size, 0.0, cost.estimated)
            self.ledger.add(stage_name(self.ledger.stage), spent)
            if self.ledger.stage and math.isnan(self.ledger.factors[-1]) and self._before:
                size = elements(shapes_of(batch))
                self.ledger.factors[-1] = cost.flops / size / self._before if size else math.nan
        self._seen, self._steps, self._passes = done, steps, 0

    def _log(self, trainer: Trainer, offset: int) -> None:
        self._clock.lap()
        if self._logged != self._seen:
            self._logged = self._seen
            metrics, step = self.ledger.metrics(growing=self._growing), trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=max(0, step + offset))

    # ------------------------------------------------------------------ growth

    def phase(self, name: str) -> AbstractContextManager[None]:
        """While something else than training is done, within fit."""
        return self._clock.within(name)

    @contextmanager
    def growth(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int, donors: Mapping[str, Phase]
    ) -> Iterator[None]:
        """While the module grows, between two optimizer steps.

        Args:
            trainer: of the run.
            module: that grows.
            batch: the current one: what it costs before and after is compared.
            index: of the batch.
            donors: what they cost, by name.
        """
        self._settle(trainer, module, batch, index)
        small, size = self.batch_cost.of(trainer, module, batch, index), elements(shapes_of(batch))
        with self._clock.within(GROWTH):
            yield
        self.batch_cost.close()
        self.batch_cost.renew()
        self._before = small.flops / size if small is not None and size else math.nan
        self.ledger.factors.append(math.nan)
        self.ledger.donors = {**donors, **self.ledger.donors}
        self._clock.rename(stage_name(self.ledger.stage))
        if _processed(trainer) < _total(trainer).ready:  # this batch is still to come
            self.batch_cost.before(trainer, module, batch, index)
        grown = self.batch_cost.of(trainer, module, batch, index)
        if small is not None and grown is not None and small.flops:
            self.ledger.factors[-1] = grown.flops / small.flops
        self._logged = -1
        self._log(trainer, 0)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What was counted, as plain data."""
        self._clock.lap()
        return {"format": FORMAT, "ledger": self.ledger.state_dict(), "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        if state_dict.get("format") != FORMAT:
            raise ValueError(f"TrainingCost: the checkpoint's state has format {state_dict.get('format')}, not {FORMAT}")
        self.ledger = self._clock.ledger = Ledger.from_state(state_dict["ledger"])
        self._before = state_dict["before"]


def _processed(trainer: Trainer) -> int:
    """Batches that are done, over all epochs."""
    return int(_total(trainer).processed)


def _total(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.batch_progress.total


def _due(trainer: Trainer) -> bool:
    """Whether this step is one that the loggers see."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    loop = trainer.fit_loop
    if not every or (loop._should_accumulate() and trainer.lightning_module.automatic_optimization):
        return False
    return bool((loop.epoch_loop._batches_that_stepped + 1) % every == 0)
