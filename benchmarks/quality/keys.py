"""Values in nested mappings and lists, by keys with dots."""

from __future__ import annotations

import hashlib
from typing import Any

Config = dict[str, Any]


def put(config: Config, key: str, value: Any) -> None:
    """Set a value at a key with dots; numbers are places in lists."""
    *path, last = key.split(".")
    part: Any = config
    for name in path:
        part = part[int(name)] if isinstance(part, list) else part.setdefault(name, {})
    part[last] = value


def get(config: Config, key: str, default: Any = None) -> Any:
    """The value at a key with dots."""
    *path, last = key.split(".")
    for name in path:
        config = config.get(name, {})
    return config.get(last, default)


def digest(content: bytes) -> str:
    """A short name for some content."""
    return hashlib.sha256(content).hexdigest()[:16]
