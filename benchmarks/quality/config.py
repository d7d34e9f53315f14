"""Tasks, methods and studies, and the configuration of a run that they make together."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.quality.keys import Config, get, put

Setting = dict[str, Any]
PLAIN = "plain"
"""Row that others are compared with."""


class StudyError(ValueError):
    """A file of the study cannot be used; the message names it."""


class DiskError(StudyError):
    """A file of the study cannot be written: no use to go on."""


@dataclass(frozen=True)
class Option:
    """Something that is tuned.

    Attributes:
        default: its value in the first trial.
        kind: ``"log"`` and ``"uniform"`` between two limits, or ``"choice"``.
        values: the limits, or what to choose from.
        key: where its value goes in the task's configuration, with dots; "" for a method's own.
        relative: whether what is there already is multiplied by the value.
    """

    default: Any
    kind: str
    values: tuple[Any, ...]
    key: str = ""
    relative: bool = False

    def at(self, share: float) -> Any:
        """The value below which that share of the option's distribution lies."""
        if self.kind == "choice":
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = map(float, self.values)
        if self.kind == "uniform":
            return float(f"{low + share * (high - low):.4g}")
        return float(f"{math.exp(math.log(low) + share * (math.log(high) - math.log(low))):.4g}")


@dataclass(frozen=True)
class Task:
    """What is learned: a configuration of LightningCLI, and what is tuned in it for every method.

    Attributes:
        name: of its files.
        title: in tables.
        score: metric besides the loss.
        higher: whether more of it is better.
        config: of LightningCLI.
        options: what is tuned for every method.
        start: the task whose plain network every run begins with.
    """

    name: str
    title: str
    score: str
    config: Config = field(repr=False)
    options: dict[str, Option] = field(repr=False)
    start: Task | None = field(default=None, repr=False)
    higher: bool = False


@dataclass(frozen=True)
class Teachers:
    """Networks that a method needs.

    Attributes:
        of: variant that trains them.
        count: how many for each run.
        vary: ``"seed"``, or ``"order"``: one initialization, but an order of the data for each.
    """

    of: str
    count: int = 1
    vary: str = "seed"


@dataclass(frozen=True)
class Method:
    """A way to train: an overlay on a task's configuration.

    Attributes:
        name: of the method.
        title: in tables.
        options: what is tuned besides the task's options.
        callbacks: of the Trainer, with ``$name`` for the value of an option.
        without: options of the task that are not tuned.
        changes: made to the built module, as ``{name: arguments}``; see ``build.CHANGES``.
        derive: what is done instead of plain training: ``"average"`` and ``"ensemble"`` train nothing, ``"reduce"`` begins
            with the teacher's best units.
        teachers: networks that it needs.
        effort: seconds of an epoch, in those of the plain network; a guess for the estimate before the first run.
    """

    name: str
    title: str
    options: dict[str, Option]
    callbacks: list[Any]
    without: tuple[str, ...] = ()
    changes: tuple[Config, ...] = ()
    derive: str = "train"
    teachers: Teachers | None = None
    effort: float = 1.0

    def space(self, task: Task) -> dict[str, Option]:
        """All that is tuned for the method on a task."""
        return {**{name: option for name, option in task.options.items() if name not in self.without}, **self.options}


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: of the row.
        method: what it trains with.
        title: in tables; by default its method's title where it is named after the method, and else its name.
        fixed: options that are not tuned.
        tuned: name of the variant whose chosen setting it takes, of another study as ``study/variant``; its own by default.
        scale: what numbers of that setting are multiplied by.
        put: values of the configuration, by key with dots.
        against: row that it is compared with.
        steps_of: variant whose epochs it takes.
        time_of: variant whose training time it is given: that one's epochs, times its step's time over this one's.
    """

    name: str
    method: str
    title: str = ""
    fixed: Setting = field(default_factory=dict)
    tuned: str | None = None
    scale: dict[str, float] = field(default_factory=dict)
    put: Config = field(default_factory=dict)
    against: str = PLAIN
    steps_of: str | None = None
    time_of: str | None = None


@dataclass(frozen=True)
class Study:
    """Variants on tasks.

    Attributes:
        name: of the file.
        title: of the table.
        tasks: to run on.
        stages: variants in the order in which they are run.
        trials: settings that are drawn and tried for each variant that is tuned.
        refinements: pairs of further trials, around the learning rate of the best one so far.
        tuning_seed: of those trials.
        seeds: of the final runs.
        methods: by name.
        bases: studies whose settings this one takes, by name.
        wanted: names of the variants to be run; None: all.
    """

    name: str
    title: str
    tasks: dict[str, Task]
    stages: list[list[Variant]]
    trials: int
    tuning_seed: int
    seeds: list[int]
    methods: dict[str, Method]
    bases: dict[str, Study] = field(default_factory=dict, repr=False)
    refinements: int = 0
    wanted: frozenset[str] | None = None

    @property
    def variants(self) -> dict[str, Variant]:
        """Those to be run."""
        return {name: row for name, row in self.known.items() if self.wanted is None or name in self.wanted}

    @property
    def known(self) -> dict[str, Variant]:
        """All; the others' networks and settings may be needed."""
        return {variant.name: variant for stage in self.stages for variant in stage}

    def title_of(self, variant: Variant) -> str:
        """What a row is called in tables."""
        method = self.methods[variant.method]
        return variant.title or (method.title if variant.name == variant.method else variant.name)

    @property
    def all_trials(self) -> int:
        """Settings that are tried for each variant."""
        return self.trials + 2 * self.refinements

    @property
    def files(self) -> list[str]:
        """Names of all tasks with results that matter."""
        return [*self.tasks, *{task.start.name: None for task in self.tasks.values() if task.start}]

    def find(self, name: str) -> tuple[Study, Variant]:
        """A variant, and the study that it is of."""
        base, _, row = name.rpartition("/")
        study = self.bases.get(base) if base else self
        if study is None or row not in study.known:
            raise StudyError(f"{self.name}: no variant {name}")
        return study, study.known[row]

    def source(self, variant: Variant) -> tuple[Study, Variant]:
        """The variant whose trials choose the setting of this one, and its study."""
        if variant.tuned is None:
            return self, variant
        study, other = self.find(variant.tuned)
        return study.source(other)

    def only(self, tasks: Sequence[str] | None, variants: Sequence[str] | None) -> Study:
        """The part of the study that is about some tasks and variants."""
        for name, known, wanted in (("task", self.tasks, tasks), ("method", self.known, variants)):
            unknown = [word for word in wanted or () if word not in known]
            if unknown:
                raise StudyError(f"no {name} {', '.join(unknown)} in the study {self.name}; there are {', '.join(known)}")
        chosen = self.tasks if tasks is None else {name: self.tasks[name] for name in tasks}
        return replace(self, tasks=chosen, wanted=None if variants is None else frozenset(variants))


# ---------------------------------------------------------------------- settings


def settings(study: Study, task: Task, variant: Variant, trials: Iterable[int] | None = None) -> list[Setting]:
    """What is tried: the task's own default, then a random search in blocks of Latin hypercubes.

    The random numbers of an option depend on its name, the task and the trial only: methods that share options try the
    same quantiles of them. More trials begin with the same ones.
    """
    space = study.methods[variant.method].space(task)
    found = []
    for trial in range(study.trials) if trials is None else trials:
        setting = {name: option.at(_share(study, task, name, trial)) for name, option in space.items()}
        if trial == 0:
            setting = {name: option.default for name, option in space.items()}
        found.append({**setting, **variant.fixed})
    return found


RATE = "lr"
"""Name of the option that is the learning rate."""


def refined(tried: Sequence[tuple[Setting, float]], fixed: Setting) -> list[Setting]:
    """Two further settings: the best one so far, with half and with twice its rate; none if no rate is searched.

    Where a rate up to that one was tried already, half-way to it on a logarithmic scale.

    Args:
        tried: settings with their validation losses.
        fixed: options that are not tuned.
    """
    best = min(tried, key=lambda pair: pair[1])[0]
    if RATE in fixed or RATE not in best:
        return []
    others = {name: value for name, value in best.items() if name != RATE}
    alike = (setting for setting, _ in tried if {**setting, RATE: 0} == {**others, RATE: 0})
    ratios = [setting[RATE] / best[RATE] for setting in alike]
    below = max((ratio for ratio in ratios if 0.49 < ratio < 1), default=0.25)
    above = min((ratio for ratio in ratios if 1 < ratio < 2.04), default=4.0)
    return [{**best, RATE: float(f"{best[RATE] * math.sqrt(ratio):.4g}")} for ratio in (below, above)]


BLOCK = 8  # trials that cover each option's range evenly


def _share(study: Study, task: Task, option: str, trial: int) -> float:
    block, position = divmod(trial, BLOCK)
    # a string seeds by its bytes, the same everywhere
    draws = random.Random(f"{study.tuning_seed}/{task.name}/{option}/{block}")
    strata = draws.sample(range(BLOCK), BLOCK)
    return (strata[position] + [draws.random() for _ in range(BLOCK)][position]) / BLOCK


def resolve(task: Task, method: Method, setting: Setting) -> Config:
    """The configuration of LightningCLI for a run; paths of data are still those of the task."""
    config = copy.deepcopy(task.config)
    for name, value in setting.items():
        option = task.options.get(name) or method.options.get(name)
        if option is not None and option.relative:
            put(config, option.key, max(1, round(value * get(config, option.key))))
        elif option is not None and option.key:
            put(config, option.key, value)
    values = {**setting, **_constants(config)}
    callbacks = _filled(method.callbacks, values)
    if callbacks:
        config.setdefault("trainer", {})["callbacks"] = [*config["trainer"].get("callbacks", []), *callbacks]
    if method.changes:
        config["changes"] = [*config.get("changes", []), *_filled(list(method.changes), values)]
    if method.derive != "train":
        config["derive"] = method.derive
    return config


def _constants(config: Config) -> Setting:
    return {"batch_size": config.get("data", {}).get("init_args", {}).get("batch_size")}


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(template, str) and template.startswith("$"):
        if template[1:] not in values:
            raise StudyError(f"methods.yaml: {template} is no option; there are {', '.join(values)}")
        return values[template[1:]]
    if isinstance(template, dict):
        return {name: _filled(part, values) for name, part in template.items()}
    if isinstance(template, list):
        return [_filled(part, values) for part in template]
    return template
