"""Step time and latency, interleaved in one process so that a change of the machine's speed meets every form alike."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from measures.subjects import FORMS, WORKLOADS, Subject

WARM_UP = 3
STEPS_PER_ROUND = 3
THREADS = 2

Task = TypeVar("Task")
Row = TypeVar("Row")


@dataclass(frozen=True)
class TimingTask:
    """What one process times: a network with each number of kernels.

    Attributes:
        workload: one of :data:`WORKLOADS`, by name.
        factors: numbers of kernels.
        process: counts the processes from 0; shifts the order in which things are timed.
        rounds: how many times each form is timed; None for the workload's own number.
        device: ``"cpu"`` or ``"cuda"``.
    """

    workload: str
    factors: tuple[int, ...]
    process: int
    rounds: int | None
    device: str


def one_by_one(measure: Callable[[Task], Row], tasks: Sequence[Task], threads: int | None) -> Iterator[Row]:
    """The tasks one after the other, each in a process of its own unless this is a trial.

    Args:
        measure: does a task; a function that those processes can import.
        tasks: of the benchmark.
        threads: of each process; None for a trial within this one.
    """
    if threads is None:
        yield from map(measure, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, torch.set_num_threads, (threads,), maxtasksperchild=1) as pool:
        yield from pool.imap(measure, tasks)


def measure_timing(task: TimingTask) -> list[dict[str, Any]]:
    """One row for each number of kernels: milliseconds per step of each form, and of one evaluation forward."""
    shift = task.process % len(task.factors)
    return [_one_factor(task, factor) for factor in task.factors[shift:] + task.factors[:shift]]


def _one_factor(task: TimingTask, factor: int) -> dict[str, Any]:
    rounds = WORKLOADS[task.workload].rounds if task.rounds is None else task.rounds
    subjects = {form: Subject(task.workload, form, factor, task.device) for form in FORMS}
    steps = interleaved({form: subject.step for form, subject in subjects.items()}, rounds, task.device, task.process)
    deployed = {form: subjects[form] for form in ("plain", "ours")}
    for subject in deployed.values():
        subject.deploy()
    forwards = {form: subject.evaluate for form, subject in deployed.items()}
    latencies = interleaved(forwards, rounds, task.device, task.process)
    return {
        "model": task.workload,
        "factor": factor,
        "process": task.process,
        "step_ms": {form: 1000 * median(times) for form, times in steps.items()},
        "step_ratio": {form: _ratio(steps[form], steps["plain"]) for form in ("ours", "graph")},
        "latency_ms": {form: 1000 * median(times) for form, times in latencies.items()},
        "latency_ratio": _ratio(latencies["ours"], latencies["plain"]),
    }


def interleaved(actions: Mapping[str, Callable[[], None]], rounds: int, device: str, shift: int) -> dict[str, list[float]]:
    """Seconds per call of each action, one number a round; the order alternates between rounds.

    What is timed follows one call of the same action that is not, so that nobody pays for the caches another has emptied.
    """
    for action in actions.values():
        for _ in range(WARM_UP):
            action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for turn in range(shift, shift + rounds):
        start = turn % len(names)
        order = names[start:] + names[:start]
        for name in order if turn // len(names) % 2 == 0 else reversed(order):
            times[name].append(_seconds(actions[name], device))
    return times


def _seconds(action: Callable[[], None], device: str) -> float:
    action()
    start = _now(device)
    for _ in range(STEPS_PER_ROUND):
        action()
    return (_now(device) - start) / STEPS_PER_ROUND


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()  # an accelerator is still working when the call returns
    return time.perf_counter()


def _ratio(times: Sequence[float], plain: Sequence[float]) -> float:
    return median(ours / base for ours, base in zip(times, plain, strict=True))
