"""How long a training step takes, relative to the one of the row that a row is compared with."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.quality.build import build
from benchmarks.quality.config import Study, StudyError
from benchmarks.quality.derive import begin
from benchmarks.quality.place import Place
from benchmarks.quality.plan import TEACHER, TIME, Results, Run, pair, timing_key
from benchmarks.quality.train import environment, fit, perform

ROUNDS, STEPS, WARM_UP = 7, 40, 8


class Clock(Callback):
    """The moments at which steps begin: between two of them lies all that belongs to a step, hooks and data included."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Median of a step, without the first ones."""
        lengths = [later - earlier for earlier, later in zip(self.moments, self.moments[1:], strict=False)]
        if not lengths:
            raise StudyError("an epoch of one batch has no two steps whose distance could be timed")
        return statistics.median(lengths[min(WARM_UP, len(lengths) // 2) :])


def step_seconds(run: Run, place: Place) -> float:
    """Of a step in a first epoch that is cut short."""
    trainer = {**run.config["trainer"], "limit_train_batches": STEPS + WARM_UP, "limit_val_batches": 0, "max_epochs": 1}
    cli = build({**run.config, "trainer": trainer}, place, run.seed)
    begin(run, place, cli)
    clock = Clock()
    cli.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    fit(cli.trainer, cli.model, cli.datamodule, run.seed)
    return clock.seconds


def measure(run: Run, other: Run, place: Place, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time two runs in turns.

    Returns:
        A line of results, with the ratio of each round.
    """
    ratios, seconds = [], []
    for number in range(rounds):
        first, second = (run, other) if number % 2 else (other, run)
        found = {one.key: step_seconds(one, place) for one in (first, second)}
        ratios.append(found[run.key] / found[other.key])
        seconds.append(found[run.key])
    what = {name: getattr(run, name) for name in ("task", "method", "setting", "seed", "split")}
    cost = {"ratios": ratios, "step_seconds": statistics.median(seconds)}
    line = {"key": timing_key(run, other), **what, "phase": TIME, "status": "timed", "reason": None, "against": other.key}
    return {**line, "metrics": {}, "cost": cost, "environment": environment(place, run.task)}


def missing(study: Study, results: Results, place: Place) -> tuple[list[tuple[Run, Run]], list[str]]:
    """What is to be timed.

    Returns:
        Pairs whose settings are chosen and that were not timed yet; names of rows that need networks that were not trained.
    """
    pairs, waiting = [], []
    for task in study.tasks.values():
        for variant in study.variants.values():
            runs = pair(study, task, variant, results)
            if runs is None or runs[0] == runs[1] or timing_key(*runs) in results:
                continue
            if all(results.get(need.key, {}).get("status") == "done" for run in runs for need in run.needs):
                pairs.append(runs)
            else:
                waiting.append(f"{task.name} {variant.name}")
    return pairs, waiting


def restore(run: Run, results: Results, place: Place) -> None:
    """Train those of the networks that a run needs which are lost once more."""
    for need in run.needs:
        if not place.network(need.key).exists():
            restore(need, results, place)
            perform(replace(need, phase=TEACHER), place, {other.key: results[other.key] for other in need.needs})
