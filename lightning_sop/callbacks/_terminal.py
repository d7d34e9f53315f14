"""What callbacks print: on the first rank, where somebody watches, unless asked otherwise."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import rich
from lightning.pytorch import Trainer
from rich.errors import LiveError
from rich.progress import Progress, SpinnerColumn

_LONG = 2.0  # seconds after which progress is shown


def show(trainer: Trainer, verbose: bool | None, *things: Any) -> None:
    """Print on the first rank.

    Args:
        trainer: of the run.
        verbose: whether to print; None: on a terminal or in a notebook.
        things: to print, one below the other.
    """
    console = rich.get_console()
    watched = console.is_terminal or console.is_jupyter
    if trainer.is_global_zero and (watched if verbose is None else verbose):
        for thing in things:
            console.print(thing)


class LateBar:
    """Progress of what takes long, on a terminal: nothing is seen of it in the first two seconds.

    A context manager, which leaves nothing on the terminal.

    Args:
        trainer: of the run; only its first rank shows anything.
        title: what takes long.
        at_once: without waiting; for a single step of unknown length, which could not report in time.
    """

    def __init__(self, trainer: Trainer, title: str, *, at_once: bool = False) -> None:
        self._title = title
        self._quiet = not (trainer.is_global_zero and rich.get_console().is_terminal)
        self._start = time.monotonic() - (_LONG if at_once else 0.0)
        self._progress: Progress | None = None
        self._tasks: dict[str, Any] = {}
        if at_once:
            self.show("", 0, None)

    def show(self, what: str, done: int, total: int | None) -> None:
        """So much of this part is done; a total of None is not known."""
        if self._quiet or time.monotonic() - self._start < _LONG:
            return
        if self._progress is None:
            self._progress = Progress(SpinnerColumn(), *Progress.get_default_columns(), transient=True)
            try:
                self._progress.start()
            except LiveError:  # the Trainer's own bar is one already
                self._progress, self._quiet = None, True
                return
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(f"{self._title}: {what}" if what else self._title, total=total)
        self._progress.update(self._tasks[what], completed=done)

    def __enter__(self) -> LateBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
