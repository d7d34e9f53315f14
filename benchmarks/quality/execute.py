"""Perform the runs of a study in several processes, in the order of its plan, and say how far it is."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.quality.config import DiskError, Study, StudyError, Task
from benchmarks.quality.estimate import Estimate, duration
from benchmarks.quality.place import Place
from benchmarks.quality.plan import FINAL, TEACHER, Run, Slot, hopeless, plan, score
from benchmarks.quality.store import Store


def prepare() -> None:
    """In a worker: no life after the process that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def work(run: Run, place: Place, given: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker: the result of a run, or what went wrong in it.

    Args:
        run: to perform.
        place: where.
        given: results of the runs that it needs, by key.
    """
    from benchmarks.quality.train import perform, quiet

    quiet()
    try:
        return perform(run, place, given)
    except StudyError as error:
        return {"key": run.key, "error": str(error), "fatal": isinstance(error, DiskError)}
    except (Exception, SystemExit):  # the study goes on with the other runs
        return {"key": run.key, "error": traceback.format_exc()}


def execute(
    study: Study, store: Store, place: Place, *, jobs: int = 2, minutes: float | None = None, console: Console | None = None
) -> int:
    """Perform what is not finished.

    Args:
        study: what to run.
        store: what is finished.
        place: where.
        jobs: processes.
        minutes: after which no run is begun any more.
        console: for messages.

    Returns:
        How many runs had errors.
    """
    return _Execution(study, store, place, jobs, minutes, console or Console(stderr=True)).go()


class _Execution:
    def __init__(self, study: Study, store: Store, place: Place, jobs: int, minutes: float | None, console: Console) -> None:
        self.study, self.store, self.place, self.jobs, self.console = study, store, place, jobs, console
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.running: dict[Future[dict[str, Any]], Slot] = {}
        self.errors: set[str] = set()
        self.causes: Counter[tuple[str, str, str]] = Counter()
        self.given_up: set[tuple[str, str]] = set()

    def go(self) -> int:
        os.environ["OMP_NUM_THREADS"] = "1"  # before any worker imports torch
        with (
            ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), prepare) as pool,
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self.console,
            ) as progress,
        ):
            bar = progress.add_task(self.study.name, total=None, left="")
            try:
                self._check()
                self._measure_first(pool, progress, bar)
                self.console.print(Estimate(self.study, self.store.results).table(self.jobs))
                self._drain(pool, progress, bar)
            except KeyboardInterrupt:
                self.console.print("stopped; finished runs are kept")
                pool.shutdown(wait=False, cancel_futures=True)
                os._exit(130)
            except BrokenProcessPool:
                self._keep_what_runs()
                self.console.print("a worker was killed (out of memory, perhaps); start the study again to go on")
                return 1
            except Exception:
                self._keep_what_runs()
                raise
        if self.errors:
            self.console.print(f"{len(self.errors)} runs had errors; they are tried again when the study is started again")
        return len(self.errors) + len(self.given_up)

    def _check(self) -> None:
        """Rows that cannot be built are told before anything is trained; the others are run."""
        if not self._open():
            return
        from benchmarks.quality.checks import unusable

        for (task, row), problem in unusable(self.study, self.store.results, self.place).items():
            self.given_up.add((task, row))
            self.console.print(f"{task} {row} cannot be run: {problem}", markup=False, highlight=False)

    def _measure_first(self, pool: ProcessPoolExecutor, progress: Progress, bar: Any) -> None:
        """The first run of each task of which no run is finished: what the estimate is made from."""
        measured = {result["task"] for result in self.store.results.values()}
        first = {slot.task: slot for slot in reversed(self._open()) if slot.task not in measured}
        if first:
            self.console.print(f"measuring a first run of {', '.join(first)}")
            self._drain(pool, progress, bar, {slot.run.key for slot in first.values() if slot.run})

    def _open(self) -> list[Slot]:
        """What could be begun now, each run once."""
        taken = {slot.run.key for slot in self.running.values() if slot.run} | self.errors
        found: dict[str, Slot] = {}
        for slot in plan(self.study, self.store.results):
            if slot.run is None or slot.run.key in self.store.results or (slot.task, slot.variant.name) in self.given_up:
                continue
            for ready in self._ready(slot):
                if ready.run is not None and ready.run.key not in taken:
                    found.setdefault(ready.run.key, ready)
        return list(found.values())

    def _ready(self, slot: Slot) -> Iterator[Slot]:
        """A slot whose needs are there, or else those of them that were run, but whose networks are lost."""
        results, needs = self.store.results, slot.run.needs if slot.run else ()
        if any(need.key not in results for need in needs):
            return
        done = [need for need in needs if results[need.key]["status"] == "done"]
        lost = [need for need in done if not self.place.network(need.key).exists()]
        for need in lost:
            # they read no test again
            yield from self._ready(Slot(need.task, slot.variant, TEACHER, slot.index, replace(need, phase=TEACHER)))
        if not lost:
            yield slot

    def _drain(self, pool: ProcessPoolExecutor, progress: Progress, bar: Any, only: Collection[str] | None = None) -> None:
        while True:
            self.store.read(self.study.files)  # another process may work on the same study
            late = self.deadline is not None and time.monotonic() > self.deadline
            ready = [slot for slot in self._open() if only is None or (slot.run and slot.run.key in only)]
            elsewhere = not late and self._begin(pool, ready)
            if elsewhere and not self.running:
                time.sleep(1)
                continue
            if not self.running:
                if late and ready:
                    self.console.print("the time is up; start the study again to go on")
                elif only is None:
                    self._say_what_waits()
                return
            estimate = Estimate(self.study, self.store.results)
            while not (done := wait(self.running, timeout=1, return_when=FIRST_COMPLETED).done):
                self._show(progress, bar, estimate)
            for future in done:
                self._finish(self.running[future], future.result())
                del self.running[future]
            self._show(progress, bar, Estimate(self.study, self.store.results))

    def _begin(self, pool: ProcessPoolExecutor, ready: list[Slot]) -> bool:
        """Begin as many runs as there are free processes.

        Returns:
            Whether there are some that another process is at, or was until now.
        """
        elsewhere = False
        for slot in ready:
            if len(self.running) == self.jobs:
                break
            assert slot.run is not None
            known = slot.run.key in self.store.results  # and its network is lost
            if not self.store.claim(slot.run.key):
                elsewhere = True
                continue
            if not known and slot.run.key in self.store.read(self.study.files).results:  # finished a moment ago
                self.store.release(slot.run.key)
                elsewhere = True
                continue
            given = {need.key: self.store.results[need.key] for need in slot.run.needs}
            self.running[pool.submit(work, slot.run, self.place, given)] = slot
        return elsewhere

    def _keep_what_runs(self) -> None:
        """The study ends: nothing that was begun is lost."""
        for future in wait(self.running).done:
            with contextlib.suppress(Exception):
                if "error" not in (result := future.result()):
                    self.store.add(result)
        for slot in self.running.values():
            if slot.run is not None:
                self.store.release(slot.run.key)

    def _say_what_waits(self) -> None:
        """For rows that are not part of this run or had errors, and for steps that `time` has not timed yet."""
        waiting = {f"{slot.task} {slot.variant.name}": None for slot in plan(self.study, self.store.results) if not slot.run}
        lost = [
            f"{task.name} {row.name}"
            for task in self.study.tasks.values()
            for row in self.study.variants.values()
            if hopeless(self.study, task, row, self.store.results)
        ]
        if lost:
            self.console.print(f"all trials diverged, and no setting can be chosen: {', '.join(lost)}")
        if waiting:
            of = f", those of {', '.join(self.study.bases)} perhaps" if self.study.bases else ""
            self.console.print(f"waiting for settings, networks or times of other rows{of}: {', '.join(waiting)}")

    def _finish(self, slot: Slot, result: dict[str, Any]) -> None:
        name = f"{slot.task} {slot.row} {slot.phase} {slot.index}"
        if "error" in result:
            self.store.release(result["key"])
            self._tell(slot, name, result)
            return
        known = self.store.results.get(slot.run.key) if slot.run else None
        self.store.add(result)
        self.store.release(result["key"])
        if known is not None:
            self._compare(name, known, result)
        task = self.study.tasks.get(slot.task)
        if task is not None and result["status"] == "done":
            self._check_metrics(task, result)
        metrics, seconds = result["metrics"], result["cost"]["wall_seconds"]
        outcome = result["reason"] or f"val_loss {metrics['val_loss']:.4f} at epoch {metrics.get('best_epoch', 0)}"
        self.console.print(f"{name}: {outcome}, {seconds:.0f} s", markup=False, highlight=False)

    def _tell(self, slot: Slot, name: str, result: dict[str, Any]) -> None:
        """An error: of the run, or of its row if it is there for the second time, or of the whole study."""
        if result.get("fatal"):
            raise StudyError(result["error"])
        self.errors.add(result["key"])
        self.console.print(f"{name}: error\n{result['error']}", markup=False, highlight=False)
        row = slot.task, slot.variant.name
        cause = (*row, result["error"].strip().splitlines()[-1])
        self.causes[cause] += 1
        if self.causes[cause] == 2:
            self.given_up.add(row)
            self.console.print(f"{' '.join(row)}: the same error for the second time; its other runs are left out")

    def _check_metrics(self, task: Task, result: Mapping[str, Any]) -> None:
        """That there is what choices and tables are made from; all runs of the task would lack it."""
        metrics, about = result["metrics"], ("val", "test") if result["phase"] == FINAL else ("val",)
        absent = [name for part in about for name in (f"{part}_loss", f"{part}_{task.score}") if name not in metrics]
        if absent:
            raise StudyError(
                f"task {task.name}: score is {task.score}, but there is no {' and no '.join(absent)} in its metrics: "
                f"{', '.join(name for name in metrics if name.startswith(('val_', 'test_')))}"
            )

    def _compare(self, name: str, known: Mapping[str, Any], again: Mapping[str, Any]) -> None:
        """A network that was lost and trained again is to be what it was; if it diverged it is not tried once more."""
        then, now = score(known), score(again)
        if math.isfinite(then) and not math.isfinite(now):  # else another process has done the same run, which diverges
            self.errors.add(known["key"])
        if not math.isclose(then, now, rel_tol=0.01):
            self.console.print(
                f"{name}: trained again, and val_loss is {now:.4f} where it was {then:.4f}; is it another machine or torch?"
            )

    def _show(self, progress: Progress, bar: Any, estimate: Estimate) -> None:
        left = estimate.seconds_left / self.jobs
        names = ", ".join(f"{slot.task} {slot.variant.name}" for slot in self.running.values())
        progress.update(
            bar, total=estimate.total, completed=estimate.finished, left=f"about {duration(left)} left, now {names}"
        )
