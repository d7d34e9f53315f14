"""Set-ups that callbacks refuse."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")


def refuse_other_lightning(module: object, callback: str) -> None:
    """Raise, by name, with a module of ``pytorch_lightning``, which is another package of the same classes.

    Raises:
        MisconfigurationException: with ``callback``.
    """
    if not isinstance(module, LightningModule):
        raise MisconfigurationException(
            f"{callback} is for modules and Trainers of lightning.pytorch, and {type(module).__name__} is none of its "
            "LightningModules. If it is one of pytorch_lightning: that is another package, and the two do not mix. Write "
            "import lightning.pytorch as pl."
        )


def refuse_sharding(trainer: Trainer, callback: str, way_out: str) -> None:
    """Raise, by name, under a strategy that shards or owns the parameters.

    Raises:
        MisconfigurationException: with ``callback``, the strategy and ``way_out``.
    """
    sharding = {base.__name__ for base in type(trainer.strategy).__mro__} & set(SHARDING)
    if sharding:
        raise MisconfigurationException(
            f"{callback} does not work with {sharding.pop()}, which shards or owns the parameters. {way_out}"
        )
