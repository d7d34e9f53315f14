"""Values in nested mappings and lists, by keys with dots."""

from __future__ import annotations

import hashlib
from typing import Any

Config = dict[str, Any]


class KeyPathError(ValueError):
    """Nothing can be at a key."""


def put(config: Config, key: str, value: Any) -> None:
    """Set a value at a key with dots; numbers are places in lists.

    Raises:
        KeyPathError: the list on its way is shorter, or what is on its way holds nothing.
    """
    *path, last = key.split(".")
    part: Any = config
    for name in path:
        if isinstance(part, list):
            part = part[_place(part, name, key)]
            continue
        if _names(part, name, key).get(name) is None:
            part[name] = {}
        part = part[name]
    if isinstance(part, list):
        part[_place(part, last, key)] = value
    else:
        _names(part, last, key)[last] = value


def get(config: Config, key: str, default: Any = None) -> Any:
    """The value at a key with dots, where there is one.

    Raises:
        KeyPathError: as in `put`.
    """
    part: Any = config
    for name in key.split("."):
        if part is None:
            return default
        part = part[_place(part, name, key)] if isinstance(part, list) else _names(part, name, key).get(name)
    return default if part is None else part


def _place(part: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(part):
        raise KeyPathError(f"{key}: {name} is no place in a list of {len(part)}")
    return int(name)


def _names(part: Any, name: str, key: str) -> Config:
    if name.isdigit():
        raise KeyPathError(f"{key}: {name} is a place in a list, and there is no list")
    if not isinstance(part, dict):
        raise KeyPathError(f"{key}: {part!r} on its way has no names; write class_path and init_args in full")
    return part


def digest(content: bytes) -> str:
    """A short name for some content."""
    return hashlib.sha256(content).hexdigest()[:16]
