"""What a study will cost, from the seconds of finished runs."""

from __future__ import annotations

import statistics
from collections import defaultdict

from rich.table import Table

from benchmarks.quality.config import PLAIN, Study, resolve, settings
from benchmarks.quality.plan import UNTRAINED, Results, Slot, plan


class Estimate:
    """Runs and seconds of a study.

    A run is expected to take as many seconds for each epoch as finished ones of its task and method did, or else as those of
    the plain method, or any, on its task times the method's ``effort``. Where the setting is still to be chosen, the epochs
    are the mean of what is tried. Networks that runs need of others are counted once, known or not.

    Args:
        study: what is to be run.
        results: what is finished.

    Attributes:
        rows: by task and variant: slots in all, slots that are open, seconds that those will take (None: not known).
    """

    def __init__(self, study: Study, results: Results) -> None:
        self.study = study
        self._rates: dict[tuple[str, str], list[float]] = defaultdict(list)
        for result in results.values():
            if result["status"] == "done":
                rate = result["cost"]["wall_seconds"] / max(1, result["metrics"]["epochs"])
                self._rates[result["task"], result["method"]].append(rate)
                self._rates[result["task"], ""].append(rate)
        self.rows: dict[tuple[str, str], list[float | None]] = {}
        seen = set()
        for slot in plan(study, results):
            key = slot.run.key if slot.run else f"{slot.task} {slot.variant.name} {slot.phase} {slot.index}"
            if key in seen:
                continue
            seen.add(key)
            row = self.rows.setdefault((slot.task, slot.row), [0, 0, 0.0])
            row[0] = (row[0] or 0) + 1
            if key not in results:
                row[1] = (row[1] or 0) + 1
                seconds = self.seconds(slot)
                row[2] = None if row[2] is None or seconds is None else row[2] + seconds

    def seconds(self, slot: Slot) -> float | None:
        """What one run will take."""
        method, effort = slot.variant.method, 1.0
        rates = self._rates.get((slot.task, method))
        if not rates:
            effort = self.study.methods[method].effort
            rates = self._rates.get((slot.task, PLAIN)) or self._rates.get((slot.task, ""))
        if not rates:
            return None
        return effort * statistics.median(rates) * (slot.run.epochs if slot.run else self._epochs(slot))

    def _epochs(self, slot: Slot) -> float:
        """Of a run whose setting is not known yet."""
        home, variant = self.study.source(slot.variant)
        method = self.study.methods[variant.method]
        if method.derive in UNTRAINED or slot.task not in home.tasks:
            return 1.0
        task = home.tasks[slot.task]
        tried = [resolve(task, method, setting) for setting in settings(home, task, variant)]
        return float(statistics.mean(config["trainer"]["max_epochs"] for config in tried))

    @property
    def total(self) -> int:
        return int(sum(row[0] or 0 for row in self.rows.values()))

    @property
    def finished(self) -> int:
        return self.total - int(sum(row[1] or 0 for row in self.rows.values()))

    @property
    def seconds_left(self) -> float:
        """Of all runs one after the other, as far as it is known."""
        return sum(row[2] or 0.0 for row in self.rows.values())

    def table(self, jobs: int) -> Table:
        """For readers."""
        table = Table("task", "variant", title=f"{self.study.name}: what is left to run")
        for column in ("finished", "left", "time"):
            table.add_column(column, justify="right")
        for (task, variant), (total, left, seconds) in self.rows.items():
            known = "not known before a first run" if seconds is None else duration(seconds)
            table.add_row(task, variant, str(int((total or 0) - (left or 0))), str(int(left or 0)), known)
        unknown = any(row[2] is None for row in self.rows.values())
        table.add_section()
        together = f"{duration(self.seconds_left / jobs)} in {jobs} processes{', and what is not known' if unknown else ''}"
        table.add_row("all", "", str(self.finished), str(self.total - self.finished), together)
        return table


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
