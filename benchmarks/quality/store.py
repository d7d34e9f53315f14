"""Finished runs: one JSON line each, in one file for each task."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.quality.config import StudyError

Result = dict[str, Any]


class Store:
    """The results in a folder, as files ``TASK.jsonl``. Several processes may add to them; of a run that was done twice the
    first result counts.

    Args:
        folder: of the files; made when something is added.

    Attributes:
        results: by key of their run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, Result] = {}
        self._told: set[Path] = set()
        self._claims: dict[str, int] = {}

    def read(self, tasks: Iterable[str]) -> Store:
        """Read what there is of some tasks."""
        for task in tasks:
            path = self.folder / f"{task}.jsonl"
            if path.exists():
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_SH)
                    content = file.read()
                found, whole = _lines(path, content)
                if whole < len(content) and path not in self._told:
                    self._told.add(path)
                    print(f"{path}: the last line is broken and is left out", file=sys.stderr)
                for result in found:
                    self.results.setdefault(result["key"], result)
        return self

    def add(self, result: Result) -> None:
        """Append a line, unless the run is there already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{result['task']}.jsonl"
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file gives it back
            content = file.read()
            found, whole = _lines(path, content)
            there = next((other for other in found if other["key"] == result["key"]), None)
            if there is None:
                if whole < len(content):
                    print(f"{path}: the last line is broken and was removed; its run will be repeated", file=sys.stderr)
                    file.truncate(whole)
                separator = b"" if content[:whole].endswith(b"\n") or not whole else b"\n"
                file.seek(whole)
                file.write(separator + json.dumps(result, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.results[result["key"]] = there or result

    def claim(self, key: str) -> bool:
        """Take a run, so that no other process begins it; False if another has it. A claim ends with its process."""
        path = self._claim(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._claims[key] = file
        return True

    def release(self, key: str) -> None:
        """Give a run back."""
        file = self._claims.pop(key, None)
        if file is not None:
            self._claim(key).unlink(missing_ok=True)
            os.close(file)

    def _claim(self, key: str) -> Path:
        return self.folder / ".running" / key


NEEDED = {"key", "task", "method", "phase", "status", "metrics", "cost", "environment"}


def _measured(result: Result) -> bool:
    """Whether a run that ended well says how well."""
    return result["status"] != "done" or "val_loss" in result["metrics"]


def _lines(path: Path, content: bytes) -> tuple[list[Result], int]:
    """All results of a file, and how many bytes they are: a killed process may have left a last line that is broken."""
    lines = content.splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            result = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise StudyError(f"{path}: line {number} is no JSON; restore or remove it") from error
            return found, len(content) - len(line)
        if not isinstance(result, dict) or not result.keys() >= NEEDED or not _measured(result):
            raise StudyError(f"{path}: line {number} is not the result of a run; restore or remove it")
        found.append(result)
    return found, len(content)
