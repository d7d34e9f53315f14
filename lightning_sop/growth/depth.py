"""Growth in depth: new residual blocks that pass their input on until they have learned something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sop.deploy.replay import Call
from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.match import close
from lightning_sop.growth.probe import float_tensors, record_visits
from lightning_sop.growth.units import find_units, own_tensors


def new_blocks(grown: Iterable[str], donor: Iterable[str]) -> list[str]:
    """Numbered children that the grown model has beyond the donor's, by the names of their tensors.

    A block is new where the donor has the list that it is in, but nothing of that number: ``layers.2`` beside a donor with
    ``layers.0`` and ``layers.1``.
    """
    known = {prefix for name in donor for prefix in _prefixes(name)}
    found: dict[str, None] = {}
    for name in grown:
        for prefix in _prefixes(name):
            parent, _, last = prefix.rpartition(".")
            if prefix not in known and last.isdigit() and (parent in known or not parent):
                found[prefix] = None
                break
    return list(found)


def inside(name: str, blocks: Sequence[str]) -> bool:
    """Whether a name is of a block, or of something in one."""
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


@torch.no_grad()
def make_identity_(model: nn.Module, blocks: Sequence[str], calls: Sequence[Call]) -> None:
    """Zero the last tensors of each block's branches, in place, so that the block returns what it gets.

    Which these are is found by trying: among the layers whose outputs have the shape of the block's, as few as possible are
    zeroed, the last ones. The rest of the block keeps its own initialization, so that the zeroed tensors have a gradient.

    Args:
        model: holds the blocks.
        blocks: their paths.
        calls: that reach them.

    Raises:
        FusionError: a block that cannot be the identity, because it normalizes or changes what it passes on.
    """
    for path in blocks:
        units = [
            (name, unit)
            for name, unit in find_units(model.get_submodule(path), path)
            if any(True for _ in own_tensors(unit))
        ]
        kept = {name: [tensor.clone() for _, tensor in own_tensors(unit)] for name, unit in units}
        target = _is_identity(model, path, calls)[1]
        by_path, run = dict(units), record_visits(model, calls, units)[0]  # in the order of their calls
        candidates = [(name, by_path[name]) for name, visits in run.items() if _shape(visits[-1].output) == target]
        for _, unit in candidates:
            _zero(unit)
        if not _is_identity(model, path, calls)[0]:
            for name, unit in candidates:
                _restore(unit, kept[name])
            raise FusionError(
                f"{path}: the new block cannot start as the identity: no layers of it, set to zero, make it pass its input "
                "on. Growth in depth needs residual blocks without a norm or projection around them."
            )
        for name, unit in candidates:
            _restore(unit, kept[name])
            if not _is_identity(model, path, calls)[0]:
                _zero(unit)


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])


def _zero(unit: nn.Module) -> None:
    for name, parameter in own_tensors(unit):
        if isinstance(parameter, nn.Parameter) and (
            not name.startswith("in_proj") or not isinstance(unit, nn.MultiheadAttention)
        ):
            parameter.zero_()


def _restore(unit: nn.Module, values: Sequence[Tensor]) -> None:
    for (_, tensor), value in zip(own_tensors(unit), values, strict=True):
        tensor.copy_(value)


def _shape(output: Any) -> tuple[int, ...]:
    return next((tuple(tensor.shape) for tensor in float_tensors(output)), ())


def _is_identity(model: nn.Module, path: str, calls: Sequence[Call]) -> tuple[bool, tuple[int, ...]]:
    """Whether a block returns its first input, at every call; and the shape of its output."""
    visits = record_visits(model, calls, [(path, model.get_submodule(path))])[0].get(path, [])
    seen = [
        (visit.inputs[0], float_tensors(visit.output)[0]) for visit in visits if visit.inputs and float_tensors(visit.output)
    ]
    same = bool(seen) and all(a.shape == b.shape and close(b, a) for a, b in seen)
    return same, tuple(seen[0][1].shape) if seen else ()
