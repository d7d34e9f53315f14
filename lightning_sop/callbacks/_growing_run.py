"""What a growth event asks of the run that it is in, and tells it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import rich
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_sop.growth import Fusion
from lightning_sop.growth.schedule import Moment

#: Strategies that shard or own the parameters, whose shapes cannot change under them.
_UNSUPPORTED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")
#: Callbacks that keep copies of the weights, or other tensors in their place, which do not grow with them.
_KEEPERS = ("SimulatedOverparam", "WeightAveraging", "StochasticWeightAveraging")


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise where a network cannot grow.

    Raises:
        MisconfigurationException: the strategy shards parameters, or a callback keeps tensors of their shapes.
    """
    unsupported = {base.__name__ for base in type(trainer.strategy).__mro__} & set(_UNSUPPORTED)
    if unsupported:
        raise MisconfigurationException(
            f"DeepFusionGrow does not work with {unsupported.pop()}, which shards or owns the parameters. Use a single "
            "device or DDP."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        keeper = {base.__name__ for base in type(callback).__mro__} & set(_KEEPERS)
        if keeper:
            raise MisconfigurationException(
                f"DeepFusionGrow does not work together with {keeper.pop()}, which keeps tensors of the weights' shapes. "
                "Grow in one run, and use it in the next, which starts from the grown checkpoint."
            )


def moment_of(trainer: Trainer, metrics: Mapping[str, float]) -> Moment:
    """Where the run is, between two optimizer steps."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    total = trainer.max_steps if trainer.max_steps > 0 else None
    if total is None and epochs is not None and epochs > 0 and batches != float("inf"):
        total = epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    return Moment(trainer.global_step, total, metrics)


def report(trainer: Trainer, fusion: Fusion, donors: Sequence[str]) -> None:
    """Log what was fused, and print it for the donors that are named."""
    before = sum(math.prod(tensor.donor_shapes[0]) for tensor in fusion.layout.tensors.values())
    after = sum(math.prod(tensor.shape) for tensor in fusion.layout.tensors.values())
    metrics = {"growth/gap": fusion.proof.gap, "growth/parameters": float(after)}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
    if donors and trainer.is_global_zero:
        rich.print(
            f"[bold]DeepFusionGrow[/bold] at step {trainer.global_step}: {len(donors)} donors ({', '.join(donors)}), "
            f"{before:,} -> {after:,} values; {fusion.proof}"
        )
