"""The weights of a deploy file: plain names, one copy of each tensor, a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sop.deploy.errors import CollapseError
from lightning_sop.deploy.parts import cpu_copy, equal, parts

State = dict[str, Any]

EXPORT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def plain_name(name: str) -> str:
    """A parameter's name in the model before ``torch.compile`` wrapped a part of it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def export_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that an export option names; None keeps every tensor's own.

    Raises:
        ValueError: The name is unknown.
    """
    if name is None:
        return None
    if name not in EXPORT_DTYPES:
        raise ValueError(f"dtype={name!r} is unknown; choose None or one of {', '.join(map(repr, EXPORT_DTYPES))}.")
    return EXPORT_DTYPES[name]


def shared_names(module: nn.Module) -> list[list[str]]:
    """Groups of names under which a module holds one and the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return [group for group in names.values() if len(group) > 1]


def equal_names(state: Mapping[str, Any]) -> list[list[str]]:
    """Groups of names whose matrices are equal bit for bit: the ties of a checkpoint, where no module can be asked."""
    groups: dict[str, list[str]] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            groups.setdefault(_digest(value), []).append(plain_name(name))
    return [group for group in groups.values() if len(group) > 1]


def export_state(state: Mapping[str, Any], *, dtype: torch.dtype | None = None, ties: Iterable[Sequence[str]] = ()) -> State:
    """Plain copy of a state_dict on the CPU.

    Args:
        state: Tensors of any device by parameter name; entries that are no tensors are passed through.
        dtype: Cast floating point tensors to it; None keeps each tensor's own.
        ties: Groups of (plain) names that stand for one tensor and are to share memory again where they are equal.

    Returns:
        Plain names and contiguous CPU tensors, none a view of something larger, so that the file holds each value once.

    Raises:
        CollapseError: A tensor is of a kind that cannot be copied; it is named.
    """
    first = {alias: group[0] for group in ties for alias in group}
    source = {plain_name(name): value for name, value in state.items()}
    made: dict[Any, Tensor] = {}
    exported: State = {}
    for name, value in source.items():
        if not isinstance(value, Tensor):
            exported[name] = value
            continue
        owner = source.get(first.get(name, name), value)
        try:
            if owner is not value and not equal(owner, value):
                owner = value
            key = _memory(owner)
            if key not in made:
                made[key] = cpu_copy(owner, dtype)
        except Exception as error:  # tensors of any class, on any device
            raise CollapseError(
                f"{name!r} of the state_dict cannot be copied ({type(error).__name__}: {error}). If the deployed model can "
                "do without it, register it with persistent=False."
            ) from error
        exported[name] = made[key]
    return exported


def sha256(state: Mapping[str, Any]) -> str:
    """Hash of names, dtypes, shapes and bytes; not of order, memory layout or ties."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name}:{_digest(value) if isinstance(value, Tensor) else repr(value)};".encode())
    return digest.hexdigest()


def distinct(state: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a state_dict, shared ones once."""
    return list({_memory(value): value for value in state.values() if isinstance(value, Tensor)}.values())


def size(state: Mapping[str, Any]) -> tuple[int, int]:
    """How many numbers a state_dict holds, and in how many bytes; shared ones once."""
    pieces = [piece for tensor in distinct(state) for piece in parts(tensor)]
    return sum(piece.numel() for piece in pieces), sum(piece.nbytes for piece in pieces)


def coarsest_dtype(state: Mapping[str, Any]) -> torch.dtype:
    """The floating point dtype of least precision in a state_dict (float32, where there is none)."""
    found = {tensor.dtype for tensor in distinct(state) if tensor.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _memory(tensor: Tensor) -> Any:
    if tensor.numel() == 0:
        return id(tensor)
    if tensor.layout is not torch.strided:
        return tensor.shape, tensor.dtype, tensor.layout, *map(_memory, parts(tensor))
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg()


def _digest(tensor: Tensor) -> str:
    pieces = parts(tensor)
    header = f"{tensor.dtype}{list(tensor.shape)}" + f"{tensor.layout}" * (len(pieces) > 1)
    digest = hashlib.sha256(header.encode())
    for piece in pieces:
        values = piece.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(b":" + hashlib.sha256(values.data).digest())
    return digest.hexdigest()
