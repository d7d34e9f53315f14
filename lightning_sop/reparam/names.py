"""Names of parameters, layers and training forms, and the patterns that select them."""

from __future__ import annotations

from fnmatch import fnmatchcase


def split(name: str) -> tuple[str, str]:
    """Path of a parameter's layer, and its name there."""
    path, _, local = name.rpartition(".")
    return path, local


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a parameter, its layer, or a module around it; ``"*.x"`` also names a top-level ``x``."""
    parts = name.split(".")
    paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(fnmatchcase(path, pattern) or fnmatchcase("." + path, pattern) for path in paths)


def owner_key(prefix: str, name: str) -> str:
    """The layer's key in a state_dict from its child's prefix (``"fc.weight_form."`` and ``"weight"``: ``"fc.weight"``)."""
    layer, _, _ = prefix.removesuffix(".").rpartition(".")
    return f"{layer}.{name}" if layer else name


def child_name(name: str) -> str:
    """Name under which a layer holds the form of its parameter ``name``."""
    return f"{name}_form"
