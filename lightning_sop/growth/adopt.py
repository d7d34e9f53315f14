"""Giving a living module the shape of another one, in place: the same module objects and hooks, wider tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"training"}


@torch.no_grad()
def adopt(
    module: nn.Module, grown: nn.Module, before: nn.Module | None = None, *, keep: frozenset[str] = frozenset()
) -> dict[nn.Parameter, nn.Parameter]:
    """Turn ``module`` into ``grown``, keeping every module object and every parameter whose shape does not change.

    Args:
        module: changed in place: tensors, children that it lacks, and attributes that depend on the width.
        grown: built with the new hyper-parameters, holding the weights to take over; must not be used afterwards.
        before: built with the old hyper-parameters; attributes in which it does not differ from ``grown`` stay as they are
            in ``module``. Without it, those that differ between ``module`` and ``grown`` are taken over.
        keep: names of attributes that stay in any case.

    Returns:
        For every parameter of ``module`` that had to be replaced, its successor.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    _adopt(module, grown, before, replaced, {}, _BOOKKEEPING | keep)
    return replaced


def _adopt(
    module: nn.Module,
    grown: nn.Module,
    before: nn.Module | None,
    replaced: dict[nn.Parameter, nn.Parameter],
    taken: dict[int, nn.Parameter],
    keep: frozenset[str],
) -> None:
    module, grown = eager(module), eager(grown)
    before = None if before is None else eager(before)
    _attributes(module, grown, before, keep)
    for name, new in grown._parameters.items():
        old = module._parameters.get(name)
        if new is None:
            continue
        if id(new) not in taken:
            if old is not None and old.shape == new.shape:
                old.copy_(new)
                taken[id(new)] = old
            else:
                like = old if old is not None else new
                taken[id(new)] = nn.Parameter(new.detach().to(like.device, like.dtype), like.requires_grad)
                if old is not None:
                    replaced[old] = taken[id(new)]
        if module._parameters.get(name) is not taken[id(new)]:
            setattr(module, name, taken[id(new)])  # not into the registry: RNNs keep a second list
    for name, buffer in grown._buffers.items():
        current = module._buffers.get(name)
        if buffer is None or current is None:
            continue
        if current.shape == buffer.shape:
            if name not in grown._non_persistent_buffers_set:  # others are no part of what was fused
                current.copy_(buffer)
        else:
            module._buffers[name] = buffer.detach().to(current.device, current.dtype)
    for name, child in grown._modules.items():
        mine = module._modules.get(name)
        if child is None:
            continue
        if mine is None:
            module.add_module(name, child)
        else:
            inner = None if before is None else before._modules.get(name)
            _adopt(mine, child, inner, replaced, taken, keep)


def eager(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the module itself."""
    inner = module._modules.get("_orig_mod")
    return inner if inner is not None else module


def _attributes(module: nn.Module, grown: nn.Module, before: nn.Module | None, keep: frozenset[str]) -> None:
    """Numbers, shapes and configurations that follow the width."""
    reference = module if before is None else before
    for name, value in grown.__dict__.items():
        if name in keep or callable(value) or isinstance(value, nn.Module) or name not in module.__dict__:
            continue
        if name in reference.__dict__ and _same(reference.__dict__[name], value):
            continue
        module.__dict__[name] = value


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape
    try:
        return bool(left == right)
    except Exception:  # a user's own comparison may fail in any way; what was built anew fits the new width
        return False
