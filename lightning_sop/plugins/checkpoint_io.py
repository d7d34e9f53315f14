"""A CheckpointIO around the Trainer's own that writes the deploy file beside every checkpoint, after it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

Job = Callable[[], object]


class DeployWriter(Protocol):
    """Who decides what is written beside a checkpoint."""

    def prepare(self, checkpoint: dict[str, Any], path: str) -> Job | None:
        """Take what is needed from the checkpoint, in the thread that saves; the job runs once the file is written."""

    def remove(self, path: str) -> None:
        """The checkpoint was removed."""

    def sync(self) -> None:
        """All pending files are written."""


class DeployCheckpointIO(_WrappingCheckpointIO):
    """Outermost CheckpointIO: lets its writers prepare, and has their jobs run right after the training file is written.

    The file may be written by another thread (``AsyncCheckpointIO``) long after ``save_checkpoint`` returned. Therefore
    the innermost CheckpointIO, which really writes, is wrapped too and runs the jobs of the path it has written.

    Args:
        checkpoint_io: The Trainer's CheckpointIO, wrapping another one or not.
    """

    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        wrapper, base = None, checkpoint_io
        while isinstance(base, _WrappingCheckpointIO) and base.checkpoint_io is not None:
            wrapper, base = base, base.checkpoint_io
        self._after = base if isinstance(base, _AfterSave) else _AfterSave(base)
        if wrapper is not None:
            wrapper._checkpoint_io = self._after  # its setter takes effect once only, and that was used
        super().__init__(self._after if wrapper is None else checkpoint_io)
        self.writers: list[DeployWriter] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Save the training file, then (or when it is written) the deploy files.

        Raises:
            Exception: What a writer's ``prepare`` raised; the training file is saved all the same.
        """
        jobs: list[Job] = []
        errors: list[Exception] = []
        for writer in self.writers:
            try:
                job = writer.prepare(checkpoint, os.fspath(path))
            except Exception as error:
                errors.append(error)
            else:
                jobs += [job] if job else []
        with self._after.expecting(os.fspath(path), jobs):
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
        if errors:
            raise errors[0]

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove the training file and the deploy files beside it."""
        super().remove_checkpoint(path)
        for writer in self.writers:
            writer.remove(os.fspath(path))

    def teardown(self) -> None:
        """Wait for everything that is still to be written."""
        io = self.checkpoint_io
        try:
            while isinstance(io, _WrappingCheckpointIO):  # Lightning's base class does not pass it on
                io.teardown()
                io = io.checkpoint_io
            self._after.teardown()
            self._after.flush()
        finally:
            for writer in self.writers:
                writer.sync()


def install(strategy: Strategy, writer: DeployWriter) -> None:
    """Have a writer called at every save of a strategy; doing it again changes nothing.

    Args:
        strategy: a Trainer's strategy, whose ``checkpoint_io`` is wrapped.
        writer: called with each checkpoint and its path.
    """
    io = strategy.checkpoint_io
    if not isinstance(io, DeployCheckpointIO):
        io = strategy.checkpoint_io = DeployCheckpointIO(io)
    if writer in io.writers:
        io.writers.remove(writer)  # an equal one, of what was before a process was spawned
    io.writers.append(writer)


class _AfterSave(CheckpointIO):
    """Innermost CheckpointIO: the one that really writes, followed by the jobs of the path."""

    def __init__(self, base: CheckpointIO) -> None:
        self._base = base
        # First in, first out for each path: ``last.ckpt`` may be queued again before it is written.
        self._pending: dict[str, deque[list[Job]]] = {}

    def expecting(self, path: str, jobs: list[Job]) -> _Expectation:
        """Have the jobs run after the path's next save, unless an exception says that there will be none."""
        return _Expectation(self._pending.setdefault(path, deque()), jobs)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        self._base.save_checkpoint(checkpoint, path, storage_options=storage_options)
        self._run(os.fspath(path))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._base.load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: _PATH) -> None:
        self._base.remove_checkpoint(path)

    def teardown(self) -> None:
        self._base.teardown()

    def flush(self) -> None:
        """Run the jobs of paths that were never seen here: some wrapper saves under another name."""
        for path in list(self._pending):
            while self._pending[path]:
                self._run(path)
        self._pending.clear()

    def _run(self, path: str) -> None:
        queue = self._pending.get(path)
        for job in queue.popleft() if queue else ():
            job()


class _Expectation:
    """Jobs put into a queue, and taken out again if the save in the ``with`` block fails."""

    def __init__(self, queue: deque[list[Job]], jobs: list[Job]) -> None:
        self._queue, self._jobs = queue, jobs

    def __enter__(self) -> None:
        self._queue.append(self._jobs)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # By identity: equal lists of jobs may wait for other saves of the path.
            for index, jobs in enumerate(self._queue):
                if jobs is self._jobs:
                    del self._queue[index]
                    break
