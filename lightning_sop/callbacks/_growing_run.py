"""What a growth event asks of the run that it is in, and tells it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_sop.callbacks._growing_shape import growing
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.callbacks._probe import ProbeRecorder
from lightning_sop.callbacks._strategies import refuse_other_lightning, refuse_sharding
from lightning_sop.callbacks._terminal import show
from lightning_sop.callbacks._training_step import call_step
from lightning_sop.deploy.replay import Call, compare, isolated_random_state, map_tensors
from lightning_sop.growth import Fusion, FusionError
from lightning_sop.growth.probe import answer, float_tensors
from lightning_sop.growth.schedule import Moment

#: Callbacks that keep copies of the weights, or other tensors in their place, which do not grow with them.
_KEEPERS = ("SimulatedOverparam", "WeightAveraging", "StochasticWeightAveraging", "ModelPruning")


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise where a network cannot grow.

    Raises:
        MisconfigurationException: the strategy shards parameters or trains copies of the module in processes of its own, or
            a callback keeps tensors of their shapes, or the run's growth events do not go together.
    """
    refuse_other_lightning(trainer.lightning_module, "DeepFusionGrow")
    refuse_sharding(trainer, "DeepFusionGrow", "Use a single device or DDP.")
    if getattr(trainer.strategy.launcher, "_start_method", None) is not None:
        raise MisconfigurationException(
            "DeepFusionGrow does not work with strategies that start a copy of this process for each device (ddp_spawn, "
            "ddp_fork, ddp_notebook): the module that you hold could not take the grown weights back. Use strategy='ddp'."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if {base.__name__ for base in type(callback).__mro__} & set(_KEEPERS):
            raise MisconfigurationException(
                f"DeepFusionGrow does not work together with {type(callback).__name__}, which keeps tensors of the weights' "
                "shapes. Grow in one run, and use it in the next, which starts from the grown checkpoint."
            )
    if len({event.target is None for event in growing(trainer)}) > 1:
        raise MisconfigurationException("DeepFusionGrow: events of one run grow with target= either all or none")


def moment_of(trainer: Trainer, metrics: Mapping[str, float]) -> Moment:
    """Where the run is, between two optimizer steps."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    totals = [trainer.max_steps] if trainer.max_steps > 0 else []
    if epochs is not None and epochs > 0 and batches != float("inf"):
        # a module that steps its optimizers itself is taken to step each of them once a batch
        optimizers = 1 if trainer.lightning_module.automatic_optimization else len(trainer.optimizers)
        totals.append(epochs * math.ceil(batches / trainer.accumulate_grad_batches) * optimizers)
    return Moment(trainer.global_step, min(totals, default=None), metrics)


def mean_over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor] | None:
    """The mean of a tensor over all processes, as a function; None where there is one process."""
    return None if trainer.world_size == 1 else partial(trainer.strategy.reduce, reduce_op="mean")


def metrics_of(trainer: Trainer) -> dict[str, float]:
    """What was logged last, the same on all ranks: each must come to the same decision."""
    metrics: dict[str, float] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics if trainer.world_size == 1 else trainer.strategy.broadcast(metrics)


def calls_of_step(trainer: Trainer | None, module: LightningModule, batch: Any, index: int) -> list[Call]:
    """The calls with which a training step enters the module's networks, from a run of it on a plain copy.

    Returns:
        The calls that were made before the step ended or failed: outside of a Trainer not every step works.
    """
    subject = plain_copy(module)
    recorder = ProbeRecorder()
    recorder.attach(subject)
    recorder.open()
    try:
        with silent(), torch.no_grad(), isolated_random_state():
            call_step(trainer, subject, map_tensors(torch.Tensor.clone, batch), index)
    except Exception:  # the user's step, outside of its Trainer: anything may happen
        pass
    finally:
        recorder.detach()
    return recorder.calls


def shared(trainer: Trainer, calls: list[Call]) -> list[Call]:
    """The first rank's calls on every rank, for all have to fuse alike."""
    if trainer.world_size == 1:
        return calls
    return trainer.strategy.broadcast([map_tensors(torch.Tensor.cpu, call) for call in calls])


def check_adopted(twin: LightningModule, fused: LightningModule, calls: Sequence[Call], tolerance: float) -> None:
    """Raise if a copy of the module that has taken the grown shape computes something else than the grown network."""
    expected, measured = (float_tensors(answer(network, calls)) for network in (fused, twin))
    names = [f"output {number}" for number in range(len(expected))]
    gap = compare(expected, measured, names) if len(expected) == len(measured) else None
    if gap is None or gap.exceeds(tolerance):
        raise FusionError(
            f"{type(twin).__name__} does not compute with the grown tensors what it computes when it is built anew: what it "
            "keeps besides parameters, buffers and plain attributes (a function made for the old width, say) does not follow"
        )


def wrap_again(trainer: Trainer, module: LightningModule) -> None:
    """Let the strategy's wrapper see the new parameters."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = module
        trainer.strategy.configure_ddp()


def report(trainer: Trainer, fusion: Fusion, donors: Sequence[str], verbose: bool | None) -> None:
    """Log what was fused, and print it."""
    before = sum(math.prod(tensor.donor_shapes[0]) for tensor in fusion.layout.tensors.values())
    after = sum(math.prod(tensor.shape) for tensor in fusion.layout.tensors.values())
    metrics = {"growth/gap": fusion.proof.gap, "growth/parameters": float(after)}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    chosen = sum(text.startswith("gradmax") for text in fusion.layout.widened.values())
    units = f"; gradmax chose new units in {chosen} of {len(fusion.layout.widened)} layers" * bool(fusion.layout.widened)
    show(
        trainer,
        verbose,
        f"[bold]DeepFusionGrow[/bold] at step {trainer.global_step}: {len(donors)} donors ({', '.join(donors)}), "
        f"{before:,} -> {after:,} values; {fusion.proof}{units}",
    )


@contextmanager
def silent() -> Iterator[None]:
    """Steps outside of a Trainer warn when they log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
