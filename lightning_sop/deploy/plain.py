"""Plain data: what ``torch.load(weights_only=True)`` (or JSON) can carry without any of the user's classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sop.deploy.names import Format

_PRIMITIVES = (type(None), bool, int, float, str)
_LEAVES = (*_PRIMITIVES, torch.dtype, torch.device, torch.Size)


def to_plain(value: Any) -> Any:
    """Copy of a value made of primitives, lists, tuples, sets, dicts, tensors, dtypes, devices and sizes only.

    Mappings of any class become dicts and numpy scalars become numbers; everything else keeps its type exactly.

    Raises:
        TypeError: Something inside is of another type.
    """
    kind = type(value)
    if kind in _LEAVES:  # exact: a subclass (an enum, say) pickles as a reference to its class
        return value
    if kind in (Tensor, nn.Parameter):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {_plain_key(key): to_plain(item) for key, item in value.items()}
    if kind in (list, tuple, set):
        return kind(to_plain(item) for item in value)
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return to_plain(value.item())
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} is not plain data")


def to_json(value: Any) -> Any:
    """Copy of a value as JSON returns it (tuples become lists).

    Raises:
        TypeError: JSON cannot carry it.
    """
    return json.loads(json.dumps(to_plain(value)))


def keep_plain(values: Mapping[str, Any], format: Format) -> tuple[dict[str, Any], list[str]]:
    """Split named values into what the format can carry and the names of the rest.

    A value that is plain only in part is left out as a whole: half a configuration is worse than none.
    """
    convert = to_json if format == "safetensors" else to_plain
    kept: dict[str, Any] = {}
    omitted: list[str] = []
    for name, value in values.items():
        try:
            kept[name] = convert(value)
        except (TypeError, ValueError):
            omitted.append(str(name))
    return kept, omitted


def _plain_key(key: Any) -> Any:
    if type(key) not in _PRIMITIVES:
        raise TypeError(f"{type(key).__qualname__} is not a plain key")
    return key
