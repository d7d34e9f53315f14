"""Step time, memory, DDP traffic and deployed size of Majority Kernels, against the plain network and the graph form.

Writes OUTPUT.json with every process's numbers and OUTPUT.md with the tables. Takes about half an hour on two cores that
have nothing else to do; --quick tries the script out in a minute and measures no times worth reading.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measures.deployed import measure_deployed
from measures.memory import measure_memory
from measures.report import environment, render
from measures.subjects import WORKLOADS
from measures.timing import THREADS, TimingTask, measure_timing
from measures.traffic import measure_traffic
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

MECHANISM = 1
"""The number of kernels that changes nothing but to go through the step cycle."""


def main(args: Sequence[str] | None = None) -> int:
    """Measure everything, write both files, print the tables.

    Args:
        args: the words after the script's name; those of this process by default.

    Returns:
        The exit status, 0.
    """
    args = sys.argv[1:] if args is None else list(args)
    options = _parse(args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        results = {
            "command": shlex.join(["python", "benchmarks/overhead.py", *args]),
            "settings": {name: value for name, value in vars(options).items() if name != "output"},
            "environment": environment(options.device, THREADS if options.processes else torch.get_num_threads()),
            **_measure(options, progress),
        }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{options.output}.json").write_text(json.dumps(results, indent=1) + "\n")
    page = render(results)
    Path(f"{options.output}.md").write_text(page)
    Console().print(Markdown(page))
    return 0


def _measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    factors = tuple(dict.fromkeys((MECHANISM, *options.factors)))
    models = list(options.models)
    tasks = [
        TimingTask(model, factors, process, options.pairs, options.device)
        for process in range(max(options.processes, 1))
        for model in models
    ]
    timing = progress.track(_timed(tasks, bool(options.processes)), len(tasks), description="step time")
    rows = [row for process in timing for row in process]
    memory, deployed = [], []
    for model in progress.track(models, description="memory"):
        memory += measure_memory(model, factors, options.device)
    for model in progress.track(models, description="collapsed network"):
        deployed += measure_deployed(model, factors, options.device)
    traffic = []
    for model in progress.track(models, description="DDP traffic"):
        traffic += measure_traffic([model], factors)
    return {"timing": rows, "memory": memory, "deployed": deployed, "traffic": traffic}


def _timed(tasks: Sequence[TimingTask], separate: bool) -> Iterator[list[dict[str, Any]]]:
    """The tasks one after the other, each in a process of its own unless this is a trial."""
    if not separate:
        yield from map(measure_timing, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, torch.set_num_threads, (THREADS,), maxtasksperchild=1) as pool:
        yield from pool.imap(measure_timing, tasks)


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a trial: one pair, k=2, timed within this process")
    parser.add_argument("--processes", type=_positive, default=5, help="that time each network (default: %(default)s)")
    parser.add_argument("--pairs", type=_positive, help="timed rounds per process (default: as many as a network needs)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="(default: all)")
    parser.add_argument("--factors", nargs="+", type=_positive, help="numbers of kernels besides 1 (default: 2 4 8)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/overhead"), help="without suffix (default: %(default)s)"
    )
    options = parser.parse_args(args)
    if options.quick:
        options.processes, options.pairs = 0, 1
    if options.factors is None:
        options.factors = [2] if options.quick else [2, 4, 8]
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
