"""Finished runs: one JSON line each, in one file for each task."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.quality.config import StudyError

Result = dict[str, Any]


class Store:
    """The results in a folder, as files ``TASK.jsonl``. Several processes may add to them.

    Args:
        folder: of the files; made when something is added.

    Attributes:
        results: by key of their run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, Result] = {}

    def read(self, tasks: Iterable[str]) -> Store:
        """Read what there is of some tasks."""
        for task in tasks:
            path = self.folder / f"{task}.jsonl"
            if path.exists():
                with _locked(path) as file:
                    self.results.update({result["key"]: result for result in _lines(path, file)})
        return self

    def add(self, result: Result) -> None:
        """Append a line, unless the run is there already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{result['task']}.jsonl"
        with _locked(path) as file:
            there = {other["key"]: other for other in _lines(path, file)}
            if result["key"] not in there:
                file.seek(0, os.SEEK_END)
                file.write(json.dumps(result, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.results[result["key"]] = there.get(result["key"], result)


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file  # closing the file gives the lock back


def _lines(path: Path, file: BinaryIO) -> list[Result]:
    """All results of a file; a last line that a killed process left broken is removed."""
    file.seek(0)
    content = file.read()
    lines = content.splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise StudyError(f"{path}: line {number} is no JSON; restore or remove it") from error
            print(f"{path}: the last line is broken and was removed; its run will be repeated", file=sys.stderr)
            file.truncate(len(content) - len(line))
            return found
    if content and not content.endswith(b"\n"):
        file.seek(0, os.SEEK_END)
        file.write(b"\n")
        file.flush()
    return found
