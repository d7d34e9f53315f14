"""Recognizing donors' activations inside a grown network's, by value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_sop.growth.axes import NEW, AxisMap

TOLERANCE = 1e-4
"""Relative to the activation's root mean square; probes run in at least float32."""
_COLUMNS = 256  # values of a unit that are compared
_LARGEST_SEARCH = 2**24  # pairs of units


def differing_axes(grown: Sequence[int], donors: Sequence[Sequence[int]]) -> list[int] | None:
    """The axes along which some donor's size is not the grown one; None where the numbers of axes differ."""
    if any(len(shape) != len(grown) for shape in donors):
        return None
    return [axis for axis, size in enumerate(grown) if any(shape[axis] != size for shape in donors)]


def close(left: Tensor, right: Tensor) -> bool:
    """Equal up to the rounding of a probe."""
    if not left.is_floating_point():
        return torch.equal(left, right.to(left.dtype))
    scale = float(right.detach().double().square().mean().sqrt()) if right.numel() else 0.0
    return torch.allclose(left, right.to(left.dtype), rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)


def match(grown: Tensor, donors: Sequence[Tensor], axis: int, guesses: Iterable[AxisMap]) -> AxisMap | None:
    """Which donor's unit lies at each position along ``axis`` of a grown activation.

    Args:
        grown: the activation in the grown network.
        donors: the same activation in each donor, of the same shape except along ``axis``.
        axis: along which the donors lie.
        guesses: regular maps to try first; what they say is preferred where values leave a choice.

    Returns:
        The map, or None: the activation is not made of the donors'.
    """
    rows = _rows(grown, axis)
    known = [_rows(tensor, axis) for tensor in donors]
    for guess in guesses:
        if len(guess) == len(rows) and _agrees(guess, rows, known):
            return guess
    return _search(rows, known)


def ratios(grown: Tensor, donors: Sequence[Tensor], axis: int, guess: AxisMap) -> list[float]:
    """The constants by which a grown activation differs from each donor's; empty where it differs by more than that."""
    factors = []
    for donor, tensor in enumerate(donors):
        where, units = guess.positions(donor)
        there, here = grown.index_select(axis, where).double(), tensor.index_select(axis, units).double()
        factor = float((there * here).sum() / here.square().sum().clamp_min(1e-300))
        if factor == 0 or not close(there, factor * here):
            return []
        factors.append(factor)
    return factors


def _rows(tensor: Tensor, axis: int) -> Tensor:
    rows = tensor.detach().movedim(axis, 0).flatten(1)
    if rows.shape[1] > _COLUMNS:
        rows = rows[:, torch.linspace(0, rows.shape[1] - 1, _COLUMNS, device=rows.device).long()]
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def _agrees(guess: AxisMap, rows: Tensor, known: Sequence[Tensor]) -> bool:
    for donor, values in enumerate(known):
        where, units = guess.positions(donor)
        if len(where) and int(units.max()) >= len(values):
            return False
        if not close(rows[where], values[units]):
            return False
    return True


def _search(rows: Tensor, known: Sequence[Tensor]) -> AxisMap | None:
    """Any arrangement: for every row a donor's row equal to it, each used before one is used again."""
    pool = torch.cat(list(known)).to(rows.dtype)
    if len(rows) * len(pool) > _LARGEST_SEARCH or len(rows) < len(pool) or not rows.is_floating_point():
        return None
    scale = pool.square().mean().sqrt()
    near = torch.cdist(rows, pool, compute_mode="donot_use_mm_for_euclid_dist") <= TOLERANCE * scale * rows.shape[1] ** 0.5
    used = torch.zeros(len(pool), dtype=torch.int64)
    chosen, last = [], -1
    for choices in near.cpu():
        options = choices.nonzero().flatten()
        if not len(options):
            chosen.append(NEW)
            continue
        fresh = options[used[options] == used[options].min()]
        following = fresh[fresh > last]
        last = int(following[0] if len(following) else fresh[0])
        used[last] += 1
        chosen.append(last)
    if not bool((used > 0).all()):
        return None
    index = torch.tensor(chosen)
    starts = torch.tensor([0, *torch.tensor([len(v) for v in known]).cumsum(0).tolist()])
    donor = torch.searchsorted(starts, index, right=True) - 1
    donor = torch.where(index == NEW, NEW, donor)
    unit = torch.where(index == NEW, 0, index - starts[donor])
    return AxisMap(donor, unit, torch.ones(len(rows), dtype=torch.float64), chunks=0)
