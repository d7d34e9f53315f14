"""Step time of a run with DynamicsMonitor over one without, on the transformer of benchmarks/overhead.py.

Lightning trains it. Steps of several kinds alternate in one run of SimulatedOverparam: without a monitor, with one that has
nothing to do, with a measurement, with one that takes the slow rows in, for the default rows and for all rows of the table.
The cost of a run is the mean over the steps as its settings make them follow each other. Writes OUTPUT.json and OUTPUT.md.
Takes about fifteen minutes on two cores that have nothing else to do; --quick tries the script out and measures no times
worth reading.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from measures.report import environment, progress, publish, spread
from measures.subjects import WORKLOADS
from measures.timing import THREADS, one_by_one
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_sop import DynamicsMonitor, MajorityKernels, SimulatedOverparam

FACTOR = 4
NEVER = 10**9
BOUNDS = {"default": 1.02, "everything, every step": 1.10}
"""Largest step time over that without a monitor."""
DEFAULT = DynamicsMonitor()
EVERYTHING = DynamicsMonitor(["*"], every=1, slow=50)


@dataclass(frozen=True)
class TimingTask:
    """What one process times.

    Attributes:
        workload: one of :data:`WORKLOADS`.
        process: counts the processes from 0; shifts the order in which kinds are timed.
        rounds: how many times each kind is timed.
    """

    workload: str
    process: int
    rounds: int


def monitors() -> dict[str, DynamicsMonitor | None]:
    """A monitor for each kind of step."""
    return {
        "plain": None,
        "idle": DynamicsMonitor(every=NEVER),
        "default": DynamicsMonitor(every=1, slow=NEVER),
        "default, slow": DynamicsMonitor(every=1, slow=1),
        "all": DynamicsMonitor(["*"], every=1, slow=NEVER),
        "all, slow": DynamicsMonitor(["*"], every=1, slow=1),
    }


class Module(pl.LightningModule):
    """The network and the optimizer of benchmarks/overhead.py."""

    def __init__(self, workload: str) -> None:
        super().__init__()
        self.net = WORKLOADS[workload].make_net()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)


class OneBatch(Dataset[tuple[Tensor, Tensor]]):
    """The same batch again and again."""

    def __init__(self, workload: str, number: int) -> None:
        self.batch, self.number = WORKLOADS[workload].make_batch(), number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batch


class Alternating(pl.Callback):
    """Lets one monitor after the other see two steps, and times the second one."""

    def __init__(self, process: int) -> None:
        self.monitors = monitors()
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self.monitors}
        self.shift = process
        self.kind, self.since = "", 0.0

    @property
    def steps(self) -> int:
        """Of one round."""
        return 2 * len(self.monitors)

    @property
    def active(self) -> DynamicsMonitor | None:
        return self.monitors.get(self.kind)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for monitor in filter(None, self.monitors.values()):
            monitor.setup(trainer, pl_module, "fit")
            monitor.on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.kind and batch_idx % 2 == 0 and batch_idx > self.steps:  # the second one has ended; the first round warms up
            self.seconds[self.kind].append(now - self.since)
        turn, place = divmod(batch_idx // 2, len(self.monitors))
        kinds = list(self.monitors)
        self.kind = kinds[(place + turn + self.shift) % len(kinds)]
        self.since = now
        if self.active is not None:
            self.active.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self.active is not None:
            self.active.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.active is not None:
            self.active.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def measure(task: TimingTask) -> dict[str, Any]:
    """Milliseconds per step of each kind, and what they come to for a run."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    alternating = Alternating(task.process)
    steps = (task.rounds + 1) * alternating.steps + 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[SimulatedOverparam(MajorityKernels(FACTOR), seed=0, verbose=False), alternating],
            logger=CSVLogger(folder),
            accelerator="cpu",
            devices=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=NEVER,
        )
        trainer.fit(Module(task.workload), DataLoader(OneBatch(task.workload, steps), batch_size=None))
    seconds = {kind: median(times) for kind, times in alternating.seconds.items()}
    ratios = {kind: _ratio(times, alternating.seconds["plain"]) for kind, times in alternating.seconds.items()}
    return {
        "model": task.workload,
        "process": task.process,
        "step_ms": {kind: 1000 * value for kind, value in seconds.items()},
        "step_ratio": ratios,
        "run_ratio": {
            "default": mean_of(ratios, "default", DEFAULT.every, DEFAULT.slow),
            "everything, every step": mean_of(ratios, "all", EVERYTHING.every, EVERYTHING.slow),
        },
    }


def mean_of(ratios: dict[str, float], rows: str, every: int, slow: int) -> float:
    """Of the steps of a run: every so many are measured, and of those every ``slow``-th takes the slow rows in."""
    measured = (ratios[f"{rows}, slow"] + (slow - 1) * ratios[rows]) / slow
    return (measured + (every - 1) * ratios["idle"]) / every


def _ratio(times: Sequence[float], plain: Sequence[float]) -> float:
    return median(ours / base for ours, base in zip(times, plain, strict=False))


def render(results: dict[str, Any]) -> str:
    """The page."""
    facts, settings, rows = results["environment"], results["settings"], results["timing"]
    made = f"{settings['processes']} separate processes" if settings["processes"] else "one trial, not a measurement"
    lines = ["| run | step time over none | bound | |", "| --- | --- | --- | --- |"]
    for name, bound in BOUNDS.items():
        found = [row["run_ratio"][name] for row in rows]
        lines.append(f"| {name} | {spread(found)} | {bound:.2f} | {'pass' if median(found) <= bound else 'FAIL'} |")
    kinds = ["| step | ms | over plain |", "| --- | --- | --- |"]
    for kind in rows[0]["step_ms"]:
        times = f"{median(row['step_ms'][kind] for row in rows):.1f}"
        kinds.append(f"| {kind} | {times} | {spread([row['step_ratio'][kind] for row in rows])} |")
    return "\n".join(
        [
            "# Overhead of DynamicsMonitor\n",
            f"Made by `{results['command']}`: {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, "
            f"{facts['system']}, Python {facts['python']}, torch {facts['torch']}; {made}. "
            f"Load of the machine when it ended: {facts['load_average'][0]:.1f}.\n",
            f"{WORKLOADS[settings['model']].title}, fused AdamW, `SimulatedOverparam` with k={FACTOR}, CSVLogger. Steps "
            "of all kinds alternate in one run; a ratio is the median over its rounds, the table gives the median and the "
            "range over processes.\n",
            *lines,
            f"\n*default* is `DynamicsMonitor()`: of {DEFAULT.every * DEFAULT.slow} steps {DEFAULT.slow} are measured, one "
            "of them with the slow rows; what a run costs is the mean over those steps. *everything, every step* is "
            f"`DynamicsMonitor(['*'], every=1, slow={EVERYTHING.slow})`: every step is measured, one in {EVERYTHING.slow} "
            "with the slow rows (spectra, losses on copies, optimizer state). With `slow=1` it is as in the last line "
            "below.\n",
            *kinds,
            "",
        ]
    )


def main(args: Sequence[str] | None = None) -> int:
    """Measure, write both files, print the page.

    Args:
        args: the words after the script's name; those of this process by default.

    Returns:
        The exit status, 0.
    """
    args = sys.argv[1:] if args is None else list(args)
    options = _parse(args)
    tasks = [TimingTask(options.model, process, options.rounds) for process in range(max(options.processes, 1))]
    with progress() as bars:
        rows = one_by_one(measure, tasks, options.threads if options.processes else None)
        timing = list(bars.track(rows, len(tasks), description="step time"))
    facts = environment("cpu", options.threads if options.processes else torch.get_num_threads())
    publish("benchmarks/monitor.py", args, options, {"environment": facts, "timing": timing}, render)
    return 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/monitor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a trial: one round, timed within this process")
    parser.add_argument("--processes", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds per process (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=THREADS, help="of each process (default: %(default)s)")
    parser.add_argument("--model", choices=WORKLOADS, default="transformer", help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/monitor"), help="without suffix (default: %(default)s)"
    )
    options = parser.parse_args(args)
    if options.quick:
        options.processes, options.rounds = 0, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
