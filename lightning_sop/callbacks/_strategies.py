"""Strategies under which the module's parameters are not where its layers are."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")


def refuse_sharding(trainer: Trainer, callback: str, way_out: str) -> None:
    """Raise, by name, under a strategy that shards or owns the parameters.

    Raises:
        MisconfigurationException: with ``callback``, the strategy and ``way_out``.
    """
    sharding = {base.__name__ for base in type(trainer.strategy).__mro__} & set(_SHARDING)
    if sharding:
        raise MisconfigurationException(
            f"{callback} does not work with {sharding.pop()}, which shards or owns the parameters. {way_out}"
        )
