"""Bytes in and out of files, local or behind an fsspec URL, never half written."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from typing import Any

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

Path = str | os.PathLike[str]


def local_path(path: Path) -> str | None:
    """The path in the local file system, or None for a remote URL."""
    filesystem, stripped = url_to_fs(os.fspath(path))
    return str(stripped) if isinstance(filesystem, LocalFileSystem) else None


def read_bytes(path: Path) -> bytes:
    """Content of a file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    filesystem, stripped = url_to_fs(os.fspath(path))
    with filesystem.open(stripped, "rb") as file:
        data: bytes = file.read()
    return data


def exists(path: Path) -> bool:
    """Whether there is such a file (a link to nowhere is none)."""
    filesystem, stripped = url_to_fs(os.fspath(path))
    return bool(filesystem.exists(stripped))


def remove(path: Path) -> None:
    """Remove a file, or a link without its target; a missing one is no error."""
    local = local_path(path)
    if local is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(local)
        return
    filesystem, stripped = url_to_fs(os.fspath(path))
    if filesystem.exists(stripped):
        filesystem.rm(stripped)


def write_atomically(path: Path, data: bytes, check: Callable[[str], Any]) -> None:
    """Write a file so that its name shows either what was there before or all of the new content.

    Args:
        path: Target; missing folders are made.
        data: The whole content.
        check: Called with the name of the finished file before it takes its place (behind a URL: right after). If it
            raises, nothing is left behind.
    """
    local = local_path(path)
    if local is None:
        _write_remote(os.fspath(path), data, check)
    else:
        _write_local(local, data, check)


def link_atomically(target: str, link: str) -> None:
    """Make (or turn) a relative symbolic link to a local file of any folder."""
    staged = _staged_name(link)
    os.symlink(os.path.relpath(target, os.path.dirname(link)), staged)
    try:
        os.replace(staged, link)
    except BaseException:
        os.unlink(staged)
        raise


def _write_local(path: str, data: bytes, check: Callable[[str], Any]) -> None:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    staged = _staged_name(path)
    try:
        # Not tempfile: its files are private to the user, a checkpoint follows the umask.
        with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check(staged)
        os.replace(staged, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staged)
        raise
    _sync_folder(folder)


def _write_remote(url: str, data: bytes, check: Callable[[str], Any]) -> None:
    filesystem, stripped = url_to_fs(url)
    filesystem.makedirs(os.path.dirname(stripped), exist_ok=True)
    with filesystem.transaction, filesystem.open(stripped, "wb") as file:
        file.write(data)
    try:
        check(url)
    except BaseException:
        filesystem.rm(stripped)
        raise


def _staged_name(path: str) -> str:
    # In the same folder, for the rename; hidden and short, since checkpoint names can be as long as a name may be.
    return os.path.join(os.path.dirname(path), f".deploy-{secrets.token_hex(8)}.tmp")


def _sync_folder(folder: str) -> None:
    if os.name == "nt":  # no such thing on Windows
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
