"""What can be said of donors and a grown model before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_sop.growth.depth import inside, new_blocks
from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.match import differing_axes


def check_shapes(donors: Sequence[nn.Module], grown: nn.Module, *, new_units: bool = False) -> None:
    """What can be said without a probe: the same tensors, and along every axis the same width or the donors' together.

    Args:
        donors: the networks to fuse.
        grown: what they are to become.
        new_units: whether the grown model may have more units than the donors together.

    Raises:
        FusionError: names the tensor and the expected shape.
    """
    check_names(donors, grown)
    states = [donor.state_dict() for donor in donors]
    for name, tensor in grown.state_dict().items():
        if any(name not in state for state in states):  # of a new block
            continue
        shapes = [tuple(state[name].shape) for state in states]
        fine = differing_axes(tensor.shape, shapes) is not None and all(
            size == sum(sizes) or (new_units and size > sum(sizes)) or all(size == other for other in sizes)
            for size, *sizes in zip(tensor.shape, *shapes, strict=True)
        )
        if not fine:
            needed = [f"{sum(s)}" if len(set(s)) > 1 else f"{sum(s)} or {s[0]}" for s in zip(*shapes, strict=False)]
            raise FusionError(
                f"{name} is of shape {tuple(tensor.shape)} in the grown model; donors of {', '.join(map(str, shapes))} need "
                f"({', '.join(needed)})"
            )
    wanted = grown.state_dict().items()
    if all(name in state and state[name].shape == tensor.shape for state in states for name, tensor in wanted):
        raise FusionError("the grown model is no larger than its donors: every tensor has the shape that it has in them")


def check_names(donors: Sequence[nn.Module], grown: nn.Module) -> None:
    """The same tensors in all donors and the grown model, but for whole new blocks of the latter.

    Raises:
        FusionError: names the first that is not.
    """
    wanted = grown.state_dict()
    for number, donor in enumerate(donors, 1):
        state = donor.state_dict()
        deeper = new_blocks(wanted, state)
        wanted = {name: tensor for name, tensor in wanted.items() if not inside(name, deeper)}
        missing, more = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        if missing or more:
            name = (missing or more)[0]
            shape = tuple((wanted if missing else state)[name].shape)
            where = "is in the grown model but not in the donor" if missing else "is in the donor but not in the grown model"
            raise FusionError(
                f"donor {number}: {name}, of shape {shape}, {where} ({len(missing)} missing, {len(more)} more); donors and "
                "grown model must be of one architecture"
            )
