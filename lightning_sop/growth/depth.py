"""Growth in depth: new residual blocks that pass their input on until they have learned something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sop.deploy.replay import Call
from lightning_sop.growth.errors import FusionError
from lightning_sop.growth.match import close
from lightning_sop.growth.probe import answer, float_tensors
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
        block = model.get_submodule(path)
        units = [(name, unit) for name, unit in find_units(block, path) if any(True for _ in own_tensors(unit))]
        kept = {name: [tensor.clone() for _, tensor in own_tensors(unit)] for name, unit in units}
        shapes = _output_shapes(model, units, calls)
        target = _is_identity(model, block, calls)[1]
        by_path = dict(units)
        candidates = [(name, by_path[name]) for name, shape in shapes.items() if shape == target]  # as they are run
        for _, unit in candidates:
            _zero(unit)
        if not _is_identity(model, block, calls)[0]:
            for name, unit in candidates:
                _restore(unit, kept[name])
            raise FusionError(
                f"{path}: the new block cannot start as the identity: no layers of it, set to zero, make it pass its input "
                "on. Growth in depth needs residual blocks without a norm or projection around them."
            )
        for name, unit in candidates:
            _restore(unit, kept[name])
            if not _is_identity(model, block, calls)[0]:
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


def _is_identity(model: nn.Module, block: nn.Module, calls: Sequence[Call]) -> tuple[bool, tuple[int, ...]]:
    """Whether a block returns its first input, at every call; and the shape of its output."""
    seen: list[tuple[Tensor, Tensor]] = []

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, outputs = float_tensors((args, kwargs)), float_tensors(output)
        if inputs and outputs:
            seen.append((inputs[0], outputs[0]))

    with _removed(block.register_forward_hook(after, with_kwargs=True)):
        answer(model, calls)
    if not seen:
        return False, ()
    same = all(a.shape == b.shape and close(b, a) for a, b in seen)
    return same, tuple(seen[0][1].shape)


def _output_shapes(
    model: nn.Module, units: Sequence[tuple[str, nn.Module]], calls: Sequence[Call]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, unit in units:

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            for tensor in float_tensors(output)[:1]:
                shapes[name] = tuple(tensor.shape)

        handles.append(unit.register_forward_hook(after))
    with _removed(*handles):
        answer(model, calls)
    return shapes


@contextmanager
def _removed(*handles: Any) -> Iterator[None]:
    """Hooks that are gone afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
