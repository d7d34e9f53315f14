"""Which runs a study consists of, in the order in which they are to be run, given what is finished."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.config import PLAIN, Method, Setting, Study, Task, Variant, refined, resolve, settings
from benchmarks.quality.keys import Config, digest, get, put

PROTOCOL = 1
"""Counts changes of what a run does that are not in its configuration."""

KEEP, LAST = "keep", "last"
"""Entry of a configuration: the epoch whose weights count, and its value for the last one; the best one without it."""
TUNE, FINAL, TEACHER = "tune", "final", "teacher"
TIME = "time"
"""Phase of results that say nothing but how long steps take."""
UNTRAINED = ("average", "ensemble")
"""What methods may derive from their teachers without training."""
Results = Mapping[str, dict[str, Any]]
"""Finished runs by key."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        key: names it in the results; everything that its outcome depends on is in it.
        task: name.
        method: name.
        phase: ``"tune"``, ``"final"`` or ``"teacher"``; only final runs read the test set, and tuning keeps no network.
        setting: the value of each option.
        seed: of initialization and order.
        split: seed of the split into training and validation.
        config: of LightningCLI, with the data's paths as in the task; ``build`` knows what else is in it.
        order: seed of the order of the data where it is not ``seed``.
        teachers: runs whose networks it needs.
        start: run whose network it begins with.
        put: what its row put into the configuration, by key with dots.
    """

    key: str
    task: str = field(compare=False)
    method: str = field(compare=False)
    phase: str = field(compare=False)
    setting: Setting = field(compare=False)
    seed: int = field(compare=False)
    split: int = field(compare=False)
    config: Config = field(compare=False, repr=False)
    order: int | None = field(default=None, compare=False)
    teachers: tuple[Run, ...] = field(default=(), compare=False, repr=False)
    start: Run | None = field(default=None, compare=False, repr=False)
    put: Config = field(default_factory=dict, compare=False, repr=False)

    @property
    def epochs(self) -> int:
        """1 for those that train nothing."""
        return 1 if self.config.get("derive") in UNTRAINED else int(self.config["trainer"]["max_epochs"])

    @property
    def needs(self) -> tuple[Run, ...]:
        """What has to be finished before, with its network kept."""
        return self.teachers if self.start is None else (*self.teachers, self.start)


@dataclass(frozen=True)
class Slot:
    """A place in the plan.

    Attributes:
        task: name.
        variant: whose row it is for.
        phase: of the run.
        index: number of the trial, or seed.
        run: what is to be run; None as long as that is not known.
    """

    task: str
    variant: Variant
    phase: str
    index: int
    run: Run | None

    @property
    def row(self) -> str:
        """Where estimates count it."""
        return f"{self.variant.name}, for others" if self.phase == TEACHER else self.variant.name


def make_run(
    study: Study,
    task: Task,
    variant: Variant,
    phase: str,
    setting: Setting,
    seed: int,
    *,
    split: int | None = None,
    order: int | None = None,
    teachers: tuple[Run, ...] = (),
) -> Run:
    """A run with its key. Whatever is not there in a plain run has no part in the key, so that older keys stay."""
    split = seed if split is None else split
    config = configure(task, study.methods[variant.method], setting, variant.put)
    if get(config, "data.init_args.seed") is not None:
        put(config, "data.init_args.seed", split)
    what: dict[str, Any] = {
        "task": task.name,
        "method": variant.method,
        "phase": phase,
        "setting": setting,
        "seed": seed,
        "split": split,
    }
    start = None if task.start is None else _start(study, task.start, seed)
    more = {
        "order": order,
        "teachers": [teacher.key for teacher in teachers] or None,
        "start": None if start is None else start.key,
    }
    known = {name: value for name, value in more.items() if value is not None}
    content = json.dumps({**what, **known, "config": config, "protocol": PROTOCOL}, sort_keys=True)
    return Run(digest(content.encode()), config=config, order=order, teachers=teachers, start=start, put=variant.put, **what)


def configure(task: Task, method: Method, setting: Setting, more: Config) -> Config:
    """The configuration of LightningCLI for a run, with what its row puts into it."""
    config = resolve(task, method, setting)
    for key, value in more.items():
        put(config, key, value)
    return config


def _start(study: Study, task: Task, seed: int) -> Run:
    """The plain network, with the default setting of a task, that runs of other tasks begin with."""
    setting = {name: option.default for name, option in task.options.items()}
    return make_run(study, task, Variant(PLAIN, PLAIN), TEACHER, setting, seed)


TEACHER_SEEDS = 20_000  # and above: of networks that no row reports


def teachers_of(study: Study, task: Task, variant: Variant, results: Results, seed: int) -> tuple[Run, ...] | None:
    """The networks that a run needs; None as long as their setting is not chosen.

    All of them have the run's own split: no image that is held out for it was trained on. The first is the run of that seed
    itself.
    """
    wanted = study.methods[variant.method].teachers
    if wanted is None:
        return ()
    study, source = study.find(wanted.of)
    setting = chosen(study, task, source, results)
    if setting is None:
        return None
    found = []
    for number in range(wanted.count):
        other = TEACHER_SEEDS + 10 * seed + number
        of_its_own = teachers_of(study, task, source, results, seed)
        if of_its_own is None:
            return None
        own, order = (seed, None) if number == 0 else (other, None) if wanted.vary == "seed" else (seed, other)
        phase = FINAL if number == 0 and seed in study.seeds else TEACHER
        run = make_run(study, task, source, phase, setting, own, split=seed, order=order, teachers=of_its_own)
        found.append(run)
    return tuple(found)


def trials(study: Study, task: Task, variant: Variant, results: Results | None = None) -> list[Run]:
    """The runs among which a variant's setting is chosen, as far as they are known: some depend on the results of others.

    None are known before the teachers are.
    A method that trains nothing has its teachers' setting, and those had their trials: none of its own.
    """
    home, tuned = study.source(variant)
    method = home.methods[tuned.method]
    if method.derive in UNTRAINED:
        assert method.teachers is not None
        return trials(home, task, home.find(method.teachers.of)[1], results)
    teachers = teachers_of(home, task, tuned, results or {}, home.tuning_seed)
    if teachers is None:
        return []

    def runs_of(made: list[Setting]) -> list[Run]:
        return [make_run(home, task, tuned, TUNE, setting, home.tuning_seed, teachers=teachers) for setting in made]

    found = runs_of(settings(home, task, tuned))
    for _ in range(home.refinements):
        if not _finished(found, results or {}):
            break
        further = refined([(run.setting, score(results[run.key])) for run in found], tuned.fixed)
        # as many as for all others, where there is no rate to be refined
        found += runs_of(further or settings(home, task, tuned, range(len(found), len(found) + 2)))
    return found


def _finished(runs: Sequence[Run], results: Results) -> bool:
    return all(run.key in results for run in runs)


def choice(study: Study, task: Task, variant: Variant, results: Results) -> Run | None:
    """The trial with the lowest validation loss; None as long as trials are missing, or if all of them diverged."""
    runs = trials(study, task, variant, results)
    if not runs or len(runs) < wanted_trials(study, variant) or not _finished(runs, results):
        return None
    best = min(runs, key=lambda run: score(results[run.key]))
    return best if math.isfinite(score(results[best.key])) else None


def wanted_trials(study: Study, variant: Variant) -> int:
    """How many choose a variant's setting; those of its teachers for a method that trains nothing."""
    home, tuned = study.source(variant)
    method = home.methods[tuned.method]
    if method.derive in UNTRAINED and method.teachers is not None:
        return wanted_trials(home, home.find(method.teachers.of)[1])
    return home.all_trials


def score(result: Mapping[str, Any]) -> float:
    """Validation loss of the kept epoch: what settings are chosen by. The test has no part in it."""
    return float(result["metrics"]["val_loss"]) if result["status"] == "done" else math.inf


def chosen(study: Study, task: Task, variant: Variant, results: Results) -> Setting | None:
    """The setting of final runs; None as long as it is not known."""
    best = choice(study, task, variant, results)
    if best is None:
        return None
    setting = dict(best.setting)
    for name, factor in variant.scale.items():
        setting[name] = _times(setting[name], factor)
    if variant.steps_of is not None:
        other = chosen(*_elsewhere(study, task, variant.steps_of), results)
        if other is None:
            return None
        setting["epochs"] = other["epochs"]
    if variant.time_of is not None:
        home, tuned = study.source(variant)
        elsewhere = _elsewhere(study, task, variant.time_of)
        mine, theirs = step_ratios(home, task, tuned, results), step_ratios(*elsewhere, results)
        other = chosen(*elsewhere, results)
        if not mine or not theirs or other is None:
            return None
        setting["epochs"] = _times(other["epochs"], statistics.median(theirs) / statistics.median(mine))
    return {**setting, **variant.fixed}


def _elsewhere(study: Study, task: Task, name: str) -> tuple[Study, Task, Variant]:
    home, variant = study.find(name)
    return home, task, variant


def _times(value: float, factor: float) -> float:
    return max(1, round(value * factor)) if isinstance(value, int) else float(f"{value * factor:.4g}")


def pair(study: Study, task: Task, variant: Variant, results: Results) -> tuple[Run, Run] | None:
    """A final run of a row and one of the row that it is compared with, whose steps are to be timed in turns.

    None as long as they are not known, and for rows that train nothing.
    """
    if study.methods[variant.method].derive in UNTRAINED or variant.against not in study.known:
        return None
    own, other = (finals(study, task, row, results) for row in (variant, study.known[variant.against]))
    return None if own is None or other is None else (own[study.seeds[0]], other[study.seeds[0]])


def timing_key(run: Run, other: Run) -> str:
    """Names the result of timing two runs in turns."""
    return digest(f"{TIME} {run.key} {other.key} {PROTOCOL}".encode())


def step_ratios(study: Study, task: Task, variant: Variant, results: Results) -> list[float]:
    """Time of a row's training step relative to that of the row that it is compared with, by round; none if not measured."""
    runs = pair(study, task, variant, results)
    if runs is None or runs[0] == runs[1]:
        return [1.0] if runs else []
    timed = results.get(timing_key(*runs))
    return timed["cost"]["ratios"] if timed else []


def finals(study: Study, task: Task, variant: Variant, results: Results) -> dict[int, Run] | None:
    """The final runs by seed; None as long as the setting is not chosen."""
    setting = chosen(study, task, variant, results)
    if setting is None:
        return None
    found = {}
    for seed in study.seeds:
        teachers = teachers_of(study, task, variant, results, seed)
        if teachers is None:
            return None
        found[seed] = make_run(study, task, variant, FINAL, setting, seed, teachers=teachers)
    return found


def used(study: Study, results: Results) -> dict[str, dict[str, Any]]:
    """The results that a study's tables are made of."""
    keys = {slot.run.key for slot in plan(study, results) if slot.run}
    pairs = (pair(study, task, row, results) for task in study.tasks.values() for row in study.variants.values())
    keys |= {timing_key(*runs) for runs in pairs if runs}
    return {key: result for key, result in results.items() if key in keys}


def plan(study: Study, results: Results) -> list[Slot]:
    """All runs of a study: stage by stage, task by task, trials before final runs, and before each what it needs."""
    return list(_slots(study, results))


def _slots(study: Study, results: Results) -> Iterator[Slot]:
    for stage in study.stages:
        for task in study.tasks.values():
            rows = [row for row in stage if row.name in study.variants]
            searched = [row for row in rows if row.tuned is None and study.methods[row.method].derive not in UNTRAINED]
            tried = {row.name: trials(study, task, row, results) for row in searched}
            for trial in range(study.all_trials):
                for row in searched:
                    attempt = tried[row.name][trial] if trial < len(tried[row.name]) else None
                    yield from _with_needs(study, Slot(task.name, row, TUNE, trial, attempt), results)
            last = {row.name: finals(study, task, row, results) for row in rows}
            for seed in study.seeds:
                for row in rows:
                    runs = last[row.name]
                    if runs is not None or not hopeless(study, task, row, results):
                        run = None if runs is None else runs[seed]
                        yield from _with_needs(study, Slot(task.name, row, FINAL, seed, run), results)


def _with_needs(study: Study, slot: Slot, results: Results) -> Iterator[Slot]:
    """A slot, after those of the networks that it needs: known as soon as their setting is, before the slot's own may be."""

    def slots_of(need: Run, variant: Variant) -> Iterator[Slot]:
        return _with_needs(study, Slot(need.task, variant, need.phase, slot.index, need), results)

    wanted = study.methods[slot.variant.method].teachers
    if wanted is not None:
        variant = study.find(wanted.of)[1]
        seed = study.tuning_seed if slot.phase == TUNE else slot.index
        known = slot.run.teachers if slot.run else teachers_of(study, study.tasks[slot.task], slot.variant, results, seed)
        for teacher in known or ():
            yield from slots_of(teacher, variant)
        # those that are not known either are there to be counted
        for number in range(slot.phase == FINAL, 0 if known else wanted.count):
            place = 100 * seed + number + (50 if number and wanted.vary == "order" else 0)
            yield Slot(slot.task, variant, TEACHER, place, None)
    if slot.run and slot.run.start:
        yield from slots_of(slot.run.start, study.known.get(PLAIN, Variant(PLAIN, PLAIN)))
    yield slot


def hopeless(study: Study, task: Task, variant: Variant, results: Results) -> bool:
    """Whether all trials diverged: nothing can be chosen then."""
    found = trials(study, task, variant, results)
    if len(found) < wanted_trials(study, variant) or not _finished(found, results):
        return False
    return all(not math.isfinite(score(results[run.key])) for run in found)
