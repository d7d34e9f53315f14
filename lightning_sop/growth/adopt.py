"""Giving a living module the shape of another one, in place: the same module objects and hooks, wider tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sop.growth.norms import GroupedNorm

_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"training"}
_DEPTH = 8  # of nested attributes that are compared


@torch.no_grad()
def adopt(
    module: nn.Module,
    grown: nn.Module,
    before: nn.Module | None = None,
    *,
    keep: frozenset[str] = frozenset(),
    within: tuple[str, ...] = (),
) -> dict[nn.Parameter, nn.Parameter]:
    """Turn ``module`` into ``grown``, keeping every module object and every parameter whose shape does not change.

    Args:
        module: changed in place: tensors, children that it lacks, and attributes that depend on the width.
        grown: built with the new hyper-parameters, holding the weights to take over; must not be used afterwards.
        before: built with the old hyper-parameters; attributes in which it does not differ from ``grown`` stay as they are
            in ``module``. Without it, those that differ between ``module`` and ``grown`` are taken over.
        keep: names of attributes that stay in any case.
        within: paths of the only parts whose attributes are taken over; default all.

    Returns:
        For every parameter of ``module`` that had to be replaced, its successor.
    """
    adoption = _Adoption(_BOOKKEEPING | keep, within)
    adoption.run(module, grown, before, "")
    return adoption.replaced


def eager(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, or the module itself."""
    inner = module._modules.get("_orig_mod")
    return inner if inner is not None else module


@dataclass
class _Adoption:
    keep: frozenset[str]
    within: tuple[str, ...]
    replaced: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    taken: dict[int, nn.Parameter] = field(default_factory=dict)  # by the grown parameter: tied ones stay tied

    def run(self, module: nn.Module, grown: nn.Module, before: nn.Module | None, path: str) -> None:
        module, grown = eager(module), eager(grown)
        before = None if before is None else eager(before)
        if isinstance(grown, GroupedNorm) and not isinstance(module, GroupedNorm):
            module.__class__ = type(grown)
            object.__setattr__(module, "group_sizes", grown.group_sizes)
        if not self.within or f"{path}.".startswith(tuple(f"{part}." for part in self.within)):
            _attributes(module, grown, before, self.keep)
        for name, parameter in grown._parameters.items():
            if parameter is not None:
                self.parameter(module, name, parameter)
        for name, buffer in grown._buffers.items():
            current = module._buffers.get(name)
            if buffer is None:
                continue
            if current is None:
                module._buffers[name] = buffer.detach()
            elif current.shape != buffer.shape:
                module._buffers[name] = buffer.detach().to(current.device, current.dtype)
            elif name not in grown._non_persistent_buffers_set:  # others are no part of what was fused
                current.copy_(buffer)
        for name, child in grown._modules.items():
            mine = module._modules.get(name)
            if child is not None and mine is None:
                module.add_module(name, child)
            elif child is not None and mine is not None:
                inner = None if before is None else before._modules.get(name)
                self.run(mine, child, inner, f"{path}.{name}" if path else name)

    def parameter(self, module: nn.Module, name: str, new: nn.Parameter) -> None:
        old = module._parameters.get(name)
        if id(new) not in self.taken:
            if old is not None and old.shape == new.shape:
                old.copy_(new)
                self.taken[id(new)] = old
            elif old is not None:
                self.taken[id(new)] = self.replaced[old] = _successor(old, new)
            else:
                self.taken[id(new)] = new
        if old is not self.taken[id(new)]:
            setattr(module, name, self.taken[id(new)])  # not into the registry: RNNs keep a second list


def _successor(old: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    """A parameter of the new values with all that users have hung on the old one: marks, and hooks on its gradient."""
    successor = nn.Parameter(new.detach().to(old.device, old.dtype), old.requires_grad)
    successor.__dict__.update(old.__dict__)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks):
            setattr(successor, hooks, getattr(old, hooks))  # the same dict: its handles still remove them
    return successor


def _attributes(module: nn.Module, grown: nn.Module, before: nn.Module | None, keep: frozenset[str]) -> None:
    """Numbers, shapes and configurations that follow the width."""
    reference = module if before is None else before
    for name, value in grown.__dict__.items():
        if name in keep or callable(value) or name not in module.__dict__ or _live(value) or _live(module.__dict__[name]):
            continue
        if name in reference.__dict__ and _same(reference.__dict__[name], value):
            continue
        module.__dict__[name] = value


def _live(value: Any, depth: int = _DEPTH) -> bool:
    """Whether it is or holds parts of the network or its optimizer, which stay the module's own."""
    if isinstance(value, (nn.Module, nn.Parameter, Optimizer)):
        return True
    if isinstance(value, Mapping):
        value = list(value.values())
    return depth > 0 and isinstance(value, (list, tuple, set)) and any(_live(item, depth - 1) for item in value)


def _same(left: Any, right: Any, depth: int = _DEPTH) -> bool:
    """Whether two attributes say the same; of tensors, which may have been computed since, only the shapes count."""
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape
    if type(left) is not type(right) or not depth:
        return False
    try:
        if isinstance(left, Mapping):
            return left.keys() == right.keys() and all(_same(left[key], right[key], depth - 1) for key in left)
        if isinstance(left, (list, tuple)):
            return len(left) == len(right) and all(_same(a, b, depth - 1) for a, b in zip(left, right, strict=True))
        if "__eq__" not in {name for cls in type(left).__mro__[:-1] for name in vars(cls)} and hasattr(left, "__dict__"):
            return _same(vars(left), vars(right), depth - 1)
        return bool(left == right)
    except Exception:  # a user's own comparison may fail in any way; what was built anew fits the new width
        return False
