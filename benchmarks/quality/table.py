"""The tables of a study, from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.config import PLAIN, RATE, Setting, Study, Task, Variant
from benchmarks.quality.costs import spent
from benchmarks.quality.plan import (
    KEEP,
    LAST,
    UNTRAINED,
    Results,
    chosen,
    finals,
    score,
    step_ratios,
    trials,
    used,
    wanted_trials,
)
from benchmarks.quality.stats import Interval, interval, paired

AGAINST = ("ema", "swa", "k_average", "distilled")
"""Besides plain, what Majority Kernels is compared with."""
OURS = "majority_kernels"
NOTHING = "-"

COSTS = (
    "Cost of a final run, mean over seeds, and the chosen settings. What it cost to train the networks that a row is "
    "made of is in all its numbers; the search for settings is in none, nor is the network that fine-tuning begins with."
    " *Seconds*: wall time of the training loop, without validation. *CPU seconds*: of the process, with validation. "
    "Both depend on what else ran there, and compare badly. *A step*: time of a step of the row's own training relative "
    "to plain (or what the row is compared with), the two in turns in one process, by `python -m benchmarks.quality "
    "time`: median and range over rounds. *FLOPs*: of forward and backward; mixing kernels, averaging weights and "
    "estimating BatchNorm anew are in the seconds only, the latter for SWA in the CPU seconds only."
)

SUMMARY = (
    "Difference of test loss, then of the score, to the row that a row is compared with: plain, if nothing else is said."
)
SCORES = {"acc": "accuracy in points"}


@dataclass(frozen=True)
class Row:
    """What is known of a variant on a task.

    Attributes:
        variant: whose row it is.
        task: on which.
        tried: trials that are finished; ``wanted``: in all; ``failed``: that diverged.
        setting: the chosen one.
        done: results of final runs by seed; ``diverged``: seeds that did not end well.
        seeds: final runs in all.
        trials_of: whose trials they are, in words, if not the row's own.
        ratios: times of a step, relative to the row that it is compared with, as measured.
    """

    variant: Variant
    task: Task
    title: str
    tried: int
    wanted: int
    failed: int
    setting: Setting | None
    done: dict[int, dict[str, Any]]
    diverged: list[int]
    seeds: int
    trials_of: str = ""
    ratios: Sequence[float] = ()

    def metric(self, name: str) -> dict[int, float]:
        """By seed."""
        return {seed: result["metrics"][name] for seed, result in self.done.items()}

    @property
    def last_losses(self) -> list[float]:
        """Validation losses of the last epochs, which early stopping does not keep; none where nothing was trained."""
        return [result["metrics"]["last"]["val_loss"] for result in self.done.values() if "last" in result["metrics"]]

    def cost(self, name: str) -> float:
        """Mean over final runs, with their teachers; NaN where it is not known."""
        values = [spent(result, name) for result in self.done.values()]
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known else math.nan

    @property
    def teachers(self) -> float:
        """Part of the FLOPs that went into them."""
        parts = [result["cost"].get("teachers", {}).get("flops", 0) or 0 for result in self.done.values()]
        return statistics.mean(parts) / self.cost("flops") if parts and self.cost("flops") else 0.0


def rows(study: Study, task: Task, results: Results) -> dict[str, Row]:
    """All rows of a task by the name of their variant."""
    found = {}
    for variant in study.variants.values():
        tried = [results[run.key] for run in trials(study, task, variant, results) if run.key in results]
        setting, last = chosen(study, task, variant, results), finals(study, task, variant, results) or {}
        ended = {seed: results[run.key] for seed, run in last.items() if run.key in results}
        done = {seed: result for seed, result in ended.items() if _ended_well(task, result)}
        found[variant.name] = Row(
            variant,
            task,
            study.title_of(variant),
            len(tried),
            wanted_trials(study, variant),
            sum(not math.isfinite(score(result)) for result in tried),
            setting,
            done,
            [seed for seed in ended if seed not in done],
            len(study.seeds),
            trials_of(study, variant),
            step_ratios(study, task, variant, results),
        )
    return found


def _ended_well(task: Task, result: dict[str, Any]) -> bool:
    """Whether all that a table is about are numbers: NaN and infinity are None in the files."""
    names = ("val_loss", "test_loss", score_name(task))
    return result["status"] == "done" and all(result["metrics"].get(name) is not None for name in names)


def rows_by_task(study: Study, results: Results) -> dict[str, dict[str, Row]]:
    """All rows of all tasks."""
    return {name: rows(study, task, results) for name, task in study.tasks.items()}


def trials_of(study: Study, variant: Variant) -> str:
    """Whose trials chose a row's setting."""
    teachers = study.methods[variant.method].teachers
    if study.methods[variant.method].derive in UNTRAINED and teachers is not None:
        return f" of {teachers.of}"
    return f" of {variant.tuned}" if variant.tuned else ""


# ---------------------------------------------------------------------- writing


def write(study: Study, results: Results, folder: Path, command: str) -> Path:
    """Write STUDY.md and the plots.

    Returns:
        The page.
    """
    from benchmarks.quality.plots import plot

    table = rows_by_task(study, results)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plot(study, table, folder)
    path = folder / f"{study.name}.md"
    path.write_text("\n".join(render(study, table, results, command, pictures)) + "\n")
    return path


def write_overview(studies: Sequence[Study], results: Results, path: Path, command: str) -> Path:
    """Write the summaries of several studies into one page, with links to their own."""
    tasks = [task for study in studies for task in study.tasks.values()]
    about = f"{SUMMARY} {scores(tasks)} Details are in each study's own page."
    lines = ["# Several studies", "", f"Made by `{command}`.", "", about]
    for study in studies:
        table = rows_by_task(study, results)
        lines += ["", f"## {study.title}", "", f"[{study.name}]({study.name}.md). {missing(table)}", "", *summary(table)]
    path.write_text("\n".join(lines) + "\n")
    return path


def render(
    study: Study, table: dict[str, dict[str, Row]], results: Results, command: str, pictures: Sequence[str]
) -> Iterator[str]:
    yield f"# {study.title}"
    yield ""
    yield f"Made by `{command}`. {environments(used(study, results))}"
    yield method_of(study)
    yield from ("", missing(table))
    if len(table) > 1:
        about = f"{SUMMARY} {scores(study.tasks.values())} Details, costs and settings are below, by task."
        yield from ("", "## All tasks", "", about, "")
        yield from summary(table)
    for name, found in table.items():
        task = study.tasks[name]
        yield from ("", f"## {name}", "", f"{task.title}.", "")
        yield from _quality(found)
        yield ""
        yield from _comparisons(found)
        yield from ("", COSTS, "")
        yield from _costs(found)
    for picture in pictures:
        yield from ("", f"![{Path(picture).stem}]({picture})")


def scores(tasks: Iterable[Task]) -> str:
    """What the scores of some tasks are."""
    names = (SCORES.get(task.score, task.score) + (", where more is better" if task.higher else "") for task in tasks)
    return f"Scores are {', or '.join(dict.fromkeys(names))}."


def summary(table: dict[str, dict[str, Row]]) -> Iterator[str]:
    """One line for each row, with a column for each task."""
    yield from head(["method", *table])
    for name in dict.fromkeys(name for found in table.values() for name in found):
        cells = [next(found[name].title for found in table.values() if name in found)]
        for found in table.values():
            row, other = found.get(name), found.get(found[name].variant.against) if name in found else None
            if row is None or other is None or row is other:
                cells.append("")
                continue
            loss = _difference(row, other, "test_loss", 1, 4)
            cells.append(loss if loss == NOTHING else f"{loss}; {_difference(row, other, *_score(row.task))}")
        yield line(cells)


def _quality(found: dict[str, Row]) -> Iterator[str]:
    label, factor, digits = score_form(next(iter(found.values())).task)
    unit = loss_unit(next(iter(found.values())).task)
    to = "difference to plain" if all(row.variant.against == PLAIN for row in found.values()) else "difference"
    losses = [f"{name}{unit}" for name in ("val loss of the last epoch", "val loss", "test loss")]
    yield from head(["method", "runs", *losses, to, f"test {label}", to])
    for row in found.values():
        plain = found.get(row.variant.against)
        cells = [row.title, progress(row), _text(interval(row.last_losses), 4)]
        cells += [_text(interval(list(row.metric(name).values())), 4) for name in ("val_loss", "test_loss")]
        cells.append(_difference(row, plain, "test_loss", 1, 4))
        cells.append(_text(interval([factor * value for value in row.metric(score_name(row.task)).values()]), digits))
        cells.append(_difference(row, plain, *_score(row.task)))
        yield line(cells)


def _comparisons(found: dict[str, Row]) -> Iterator[str]:
    """Majority Kernels against more than plain."""
    if OURS not in found:
        return
    ours = found[OURS]
    label, *_ = score_form(ours.task)
    for other in (found[name] for name in AGAINST if name in found):
        loss, points = _difference(ours, other, "test_loss", 1, 4), _difference(ours, other, *_score(ours.task))
        yield f"- {ours.title} minus {other.title}: test loss {loss}, test {label} {points}"


def _costs(found: dict[str, Row]) -> Iterator[str]:
    header = ["method", "steps", "seconds", "CPU seconds", "a step", "FLOPs", "parameters trained / deployed"]
    yield from head([*header, "trials", "setting"])
    for row in found.values():
        parameters = next((result["cost"]["parameters"] for result in row.done.values()), None)
        trained = f"{parameters['training']:,} / {parameters['deployed']:,}" if parameters else NOTHING
        setting = ", ".join(f"{name} {value}" for name, value in (row.setting or {}).items()) or "not chosen yet"
        cells = [row.title, *(_number(row.cost(name), ",.0f") for name in ("steps", "seconds", "cpu_seconds"))]
        flops = _number(row.cost("flops"), ".3g") + (f", {row.teachers:.0%} of them teachers'" if row.teachers else "")
        failed = f", {row.failed} diverged" if row.failed else ""
        yield line(
            [*cells, _range(row.ratios), flops, trained, f"{row.tried} of {row.wanted}{row.trials_of}{failed}", setting]
        )


def _range(values: Sequence[float]) -> str:
    """Median, least and largest."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values) or NOTHING
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else NOTHING


def method_of(study: Study) -> str:
    """How the numbers came about."""
    if all(row.tuned for row in study.known.values()):
        settings = (
            f"Settings are those chosen in {', '.join(study.bases)} by validation loss, but for what the rows are about. "
        )
    elif study.all_trials == 1:
        settings = "Settings are the tasks' defaults, but for what the rows are about. "
    else:
        settings = (
            f"Each row's setting is the best of {study.all_trials} trials by validation loss, on seed {study.tuning_seed}, "
            f"which no other run has. The first trial is the task's default{refinement(study)}. Rows that are made of "
            "trained networks and train nothing have the setting, and the trials, of those. "
        )
    kept = (
        "A run keeps its epoch of lowest validation loss; the test was read once, for that epoch, and the last epoch is in "
        "one column only. "
    )
    if all(row.put.get(KEEP) == LAST for row in study.known.values()):
        kept = "A run keeps its last epoch; the test was read once, for that. "
    return (
        f"{settings}Final runs have {len(study.seeds)} seeds; a seed gives every method the same initialization (if it has "
        f"the plain network's sizes), validation split and order of the data. {kept}Mean ± 95 % interval (Student's t) "
        "over seeds; differences are paired by seed. **Bold**: the interval excludes 0; nothing is corrected for the "
        "number of comparisons."
    )


def refinement(study: Study) -> str:
    """How trials go on from the random ones."""
    if not study.refinements:
        return ""
    further = f"{2 * study.refinements} bracket the learning rate of the best so far"
    if any(RATE in row.fixed for row in study.known.values()):
        further += " (drawn, too, where that is fixed)"
    return f", {study.trials - 1} are drawn, and {further}"


def missing(table: dict[str, dict[str, Row]]) -> str:
    """Which rows are not complete, and how much is missing in all."""
    rows = [row for found in table.values() for row in found.values()]
    absent = sum(row.seeds - len(row.done) - len(row.diverged) for row in rows)
    unfinished = sum(row.seeds > len(row.done) + len(row.diverged) for row in rows)
    if not absent:
        return "All final runs are there."
    wanted = sum(row.seeds for row in rows)
    return f"**{absent} of {wanted} final runs are missing**, in {unfinished} of {len(rows)} rows."


def progress(row: Row) -> str:
    """How many seeds there are, and what became of the others."""
    missing = row.seeds - len(row.done) - len(row.diverged)
    text = f"{len(row.done)} of {row.seeds} seeds so far" if missing else str(len(row.done))
    return text + (f", {len(row.diverged)} diverged" if row.diverged else "")


def score_name(task: Task) -> str:
    return f"test_{task.score}"


def score_form(task: Task) -> tuple[str, float, int]:
    """What the score is called in tables, by what it is multiplied, and its digits."""
    return ("accuracy, %", 100.0, 2) if task.score == "acc" else (task.score, 1.0, 3)


def _score(task: Task) -> tuple[str, float, int]:
    """The score's name, by what it is multiplied, and its digits."""
    return score_name(task), *score_form(task)[1:]


def loss_unit(task: Task) -> str:
    """Of a language model's loss."""
    return ", nats a token" if task.score == "perplexity" else ""


def _difference(row: Row, other: Row | None, name: str, factor: float, digits: int) -> str:
    if other is None or row is other:
        return ""
    found = paired(row.metric(name), other.metric(name))
    if found is None:
        return NOTHING
    found = Interval(factor * found.mean, factor * found.half, found.count)
    text = found.text(digits, signed=True)
    few = f" ({found.count} seeds)" if found.count < row.seeds else ""
    to = f" to {other.title}" if row.variant.against not in (PLAIN, row.variant.name) else ""
    return (f"**{text}**" if found.excludes_zero else text) + to + few


def _text(found: Interval | None, digits: int) -> str:
    return NOTHING if found is None else found.text(digits)


def head(header: Sequence[str]) -> Iterator[str]:
    """The first two lines of a table in Markdown."""
    yield line(header)
    yield line(["---"] * len(header))


def line(cells: Sequence[str]) -> str:
    """One of its lines."""
    return f"| {' | '.join(cells)} |"


def environments(results: Results) -> str:
    """Where the runs were made."""
    kinds = {
        f"{e['device']}, {e['threads']} thread(s), {e['system']}, torch {e['torch']}, lightning {e['lightning']}"
        for e in (result["environment"] for result in results.values())
    }
    commits = sorted({result["environment"]["commit"] or "unknown" for result in results.values()})
    return f"Runs on: {'; '.join(sorted(kinds))}; code: {', '.join(commits)}." if kinds else "No run is finished."
