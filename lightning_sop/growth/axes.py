"""Where the units of several donors lie along one axis of a grown tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_sop.growth.errors import FusionError

NEW = -1
"""In the place of a donor: a unit that no donor has."""


@dataclass(frozen=True, eq=False)
class AxisMap:
    """For every position of a grown axis, the donor's unit it comes from, and a factor.

    Attributes:
        donor: (size,) which donor, counted from 0, or :data:`NEW`.
        unit: (size,) which of that donor's units; 0 for a new one.
        share: (size,) float64 factor of what is taken from the donor: 1, unless the weights of an average, or of copies
            of one unit, go here.
        chunks: of how many equal parts the axis consists, in each of which the donors lie side by side (3 for q|k|v in one
            matrix); 0 where it is no such regular pattern.
        summed: whether the axis is summed over (a layer's inputs) and not one of output units.
    """

    donor: Tensor
    unit: Tensor
    share: Tensor
    chunks: int = 1
    summed: bool = False

    def __len__(self) -> int:
        return len(self.donor)

    def positions(self, donor: int) -> tuple[Tensor, Tensor]:
        """Positions of a donor's units, and the units there."""
        where = (self.donor == donor).nonzero().flatten()
        return where, self.unit[where]

    @property
    def new(self) -> Tensor:
        """Positions of new units."""
        return (self.donor == NEW).nonzero().flatten()

    def same(self, other: AxisMap) -> bool:
        """Whether both take the same units to the same positions, with whatever factors."""
        return torch.equal(self.donor, other.donor) and torch.equal(self.unit, other.unit)

    def times(self, factors: Sequence[float]) -> AxisMap:
        """The map with the share of each donor's units multiplied by that donor's factor."""
        by_donor = torch.tensor([*factors, 1.0], dtype=torch.float64)  # the last one is for NEW = -1
        return replace(self, share=self.share * by_donor[self.donor])

    def averaging(self, weights: Sequence[float]) -> AxisMap:
        """For an axis that is summed over: each donor's units get its weight, divided among copies of one unit."""
        share = torch.ones_like(self.share)
        for donor, weight in enumerate(weights):
            where, units = self.positions(donor)
            copies = torch.bincount(units)
            share[where] = weight / copies[units].double()
        return replace(self, share=share)

    def place(self, tensors: Sequence[Tensor], into: Tensor, axis: int, *, scaled: bool = True) -> Tensor:
        """Write the donors' tensors into a grown one along ``axis``, in place; new positions stay as they are."""
        for donor, tensor in enumerate(tensors):
            where, units = self.positions(donor)
            values = tensor.index_select(axis, units.to(tensor.device))
            if scaled:
                shape = [-1 if a == axis % into.dim() else 1 for a in range(into.dim())]
                values = values * self.share[where].to(values.device, values.dtype).view(shape)
            into.index_copy_(axis, where.to(into.device), values.to(into.dtype))
        return into

    def describe(self) -> str:
        """For tables: the sizes side by side."""
        counts = torch.bincount(self.donor[self.donor != NEW]).tolist()
        text = "|".join(map(str, counts)) + (f"|+{len(self.new)}" if len(self.new) else "")
        return text + {0: " mixed", 1: ""}.get(self.chunks, f" in {self.chunks} chunks")


def side_by_side(sizes: Sequence[int], size: int, chunks: int = 1, *, copy: bool = False) -> AxisMap | None:
    """The map of donors' axes put side by side within each of ``chunks`` equal parts, then new units or copies.

    Args:
        sizes: the donors' sizes along the axis.
        size: the grown size, at least their sum.
        chunks: number of parts.
        copy: positions beyond the donors' repeat the donors' units in order, instead of being new.

    Returns:
        The map, or None where sizes and chunks do not divide or do not fit.
    """
    if size < sum(sizes) or any(n % chunks for n in (*sizes, size)):
        return None
    donor, unit = [], []
    for chunk in range(chunks):
        parts = [n // chunks for n in sizes]
        donors = torch.cat([torch.full((n,), j) for j, n in enumerate(parts)])
        units = torch.cat([torch.arange(n) + chunk * n for n in parts])
        extra = size // chunks - len(donors)
        again = torch.arange(extra) % len(donors)
        donor += [donors, donors[again] if copy else torch.full((extra,), NEW)]
        unit += [units, units[again] if copy else torch.zeros(extra, dtype=torch.int64)]
    return AxisMap(torch.cat(donor), torch.cat(unit), torch.ones(size, dtype=torch.float64), chunks)


def by_groups(inputs: AxisMap, size: int, groups: int, sizes: Sequence[int]) -> AxisMap:
    """The outputs of a grouped convolution: each group's go where its inputs are."""
    inside, outside = len(inputs) // groups, size // groups
    first = inputs.donor[::inside], inputs.unit[::inside]  # of every group
    group = torch.div(first[1], inside, rounding_mode="floor")
    donor = first[0].repeat_interleave(outside)
    unit = (group * outside).repeat_interleave(outside) + torch.arange(outside).repeat(groups)
    unit = torch.where(donor == NEW, 0, unit)
    if any(len(set(unit[donor == j].tolist())) != n for j, n in enumerate(sizes)):
        raise FusionError(
            f"grouped convolution: {groups} groups of {outside} outputs cannot hold the donors' groups; the number "
            "of groups must grow with the width"
        )
    return AxisMap(donor, unit, torch.ones(size, dtype=torch.float64), inputs.chunks)


def identity(size: int) -> AxisMap:
    """One donor's axis as it is."""
    zeros = torch.zeros(size, dtype=torch.int64)
    return AxisMap(zeros, torch.arange(size), torch.ones(size, dtype=torch.float64))
