"""What a deploy file is called, and which formats there are."""

from __future__ import annotations

import os
import re
from typing import Literal, get_args

Format = Literal["ckpt", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)

# Letters only: ``epoch=0-val=0.25`` and ``run.v2`` end in a number that tells them from their neighbours.
_SUFFIX = re.compile(r"(?<=[^/\\])\.[A-Za-z]+$")


def deploy_path(path: str | os.PathLike[str], format: Format = "ckpt") -> str:
    """Name of the deploy file beside a training checkpoint.

    Args:
        path: Path or fsspec URL of the training checkpoint, with any suffix or none.
        format: ``"ckpt"`` or ``"safetensors"``.

    Returns:
        ``<path without its suffix>.deploy.<format>``.

    Raises:
        ValueError: The format is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(map(repr, FORMATS))}.")
    return f"{_SUFFIX.sub('', os.fspath(path))}.deploy.{format}"


def format_of(path: str | os.PathLike[str]) -> Format:
    """Format that a file's name asks for: safetensors where it ends so, else ckpt."""
    return "safetensors" if os.fspath(path).endswith(".safetensors") else "ckpt"
