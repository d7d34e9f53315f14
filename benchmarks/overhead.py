"""Step time, memory, DDP traffic and deployed size of Majority Kernels, against the plain network and the graph form.

Writes OUTPUT.json with every process's numbers and OUTPUT.md with the tables. Takes about half an hour on two cores that
have nothing else to do; --quick tries the script out in a minute and measures no times worth reading.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measures.deployed import measure_deployed
from measures.memory import measure_memory
from measures.report import environment, progress, publish, render
from measures.subjects import WORKLOADS
from measures.timing import THREADS, TimingTask, measure_timing, one_by_one
from measures.traffic import measure_traffic
from rich.progress import Progress

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
    with progress() as bars:
        facts = environment(options.device, THREADS if options.processes else torch.get_num_threads())
        measured = _measure(options, bars)
    publish("benchmarks/overhead.py", args, options, {"environment": facts, **measured}, render)
    return 0


def _measure(options: argparse.Namespace, bars: Progress) -> dict[str, Any]:
    factors = tuple(dict.fromkeys((MECHANISM, *options.factors)))
    models = list(options.models)
    tasks = [
        TimingTask(model, factors, process, options.pairs, options.device)
        for process in range(max(options.processes, 1))
        for model in models
    ]
    timing = one_by_one(measure_timing, tasks, THREADS if options.processes else None)
    rows = [row for process in bars.track(timing, len(tasks), description="step time") for row in process]
    memory, deployed = [], []
    for model in bars.track(models, description="memory"):
        memory += measure_memory(model, factors, options.device)
    for model in bars.track(models, description="collapsed network"):
        deployed += measure_deployed(model, factors, options.device)
    traffic = []
    for model in bars.track(models, description="DDP traffic"):
        traffic += measure_traffic([model], factors)
    return {"timing": rows, "memory": memory, "deployed": deployed, "traffic": traffic}


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
