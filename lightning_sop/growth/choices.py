"""What the shapes of a fusion leave open, and how one learns that a choice was wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_sop.growth.axes import side_by_side
from lightning_sop.growth.blocks import average
from lightning_sop.growth.match import differing_axes

CHUNKS = (1, 2, 3, 4, 5, 6, 8)
"""Numbers of equal parts that are tried for an axis whose arrangement the shapes leave open."""


@dataclass(frozen=True)
class Choices:
    """What the shapes leave open.

    Attributes:
        chunks: by pattern of a unit's path: equal parts of its outputs, in each of which the donors lie side by side; or by
            pattern of a tensor's name and ``out`` or ``in``, for one axis alone.
        swapped: patterns of modules of unknown type, or names of tensors, with inputs where outputs are expected.
        mixing: patterns of modules of unknown type that compute across units, as norms do.
        embeddings: patterns of embeddings that the model multiplies by the square root of its width.
        gains: by path: factors of each donor's part of a unit's output.
        offsets: paths of units that add 1 to their tensors before they multiply by them.
        inside: by path: factors of each donor's part of a unit's tensors, which the unit itself undoes.
    """

    chunks: Mapping[str, int] = field(default_factory=dict)
    swapped: frozenset[str] = frozenset()
    mixing: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    gains: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    offsets: frozenset[str] = frozenset()
    inside: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class MismatchError(Exception):
    """The donors were not recognized at a unit, the ``order``-th that was run."""

    def __init__(self, order: int, path: str, reason: str) -> None:
        super().__init__(reason)
        self.order, self.path, self.reason = order, path, reason


class RetryError(Exception):
    """Another pass is needed, with these choices."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices


def fused_output(donors: Sequence[Tensor], like: Tensor, weights: Sequence[float]) -> Tensor | None:
    """What a fused network answers: the donors' average, or their features side by side; None if it is neither."""
    growing = differing_axes(like.shape, [tensor.shape for tensor in donors])
    if growing is None or len(growing) > 1:
        return None
    if not growing:
        return average(donors, weights)
    axis = growing[0]
    places = side_by_side([tensor.shape[axis] for tensor in donors], like.shape[axis])
    return None if places is None else places.place(donors, like.clone(), axis)
