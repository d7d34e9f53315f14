"""What was measured, written down: as numbers in JSON, and as tables in Markdown with the bounds that they are held to."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from measures.subjects import WORKLOADS
from measures.timing import STEPS_PER_ROUND

Rows = Sequence[dict[str, Any]]

STEP_BOUNDS = {("mlp", 4): 1.45, ("resnet", 4): 1.03, ("transformer", 4): 1.03}
"""Largest median of step time over plain, by network and number of kernels."""
MEGABYTE = 1e6


def progress() -> Progress:
    """Bars for what is being measured, apart from the page."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def publish(
    script: str,
    args: Sequence[str],
    options: argparse.Namespace,
    measured: dict[str, Any],
    render: Callable[[dict[str, Any]], str],
) -> None:
    """Write OUTPUT.json and OUTPUT.md, and print the page.

    Args:
        script: from the root of the repository.
        args: the words after its name.
        options: what they stand for; ``output`` is the path of both files, without suffix.
        measured: the environment and the numbers.
        render: makes the page of everything that is in the file of numbers.
    """
    results = {
        "command": shlex.join(["python", script, *args]),
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        **measured,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{options.output}.json").write_text(json.dumps(results, indent=1) + "\n")
    page = render(results)
    Path(f"{options.output}.md").write_text(page)
    Console().print(Markdown(page))


def environment(device: str, threads: int) -> dict[str, Any]:
    """What the numbers depend on: machine and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "system": platform.system(),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def render(results: dict[str, Any]) -> str:
    """The whole page."""
    timing = results["timing"]
    sections = [
        ("# Overhead of Majority Kernels over the plain network", _preamble(results)),
        ("## Step time", _STEP_TEXT, _step_table(timing)),
        ("## Peak memory of tensors", _MEMORY_TEXT, _memory_table(results["memory"])),
        ("## Bytes that DDP reduces per step", _TRAFFIC_TEXT, _traffic_table(results["traffic"])),
        ("## Collapsed network", _DEPLOYED_TEXT, _deployed_table(results["deployed"], timing)),
    ]
    return "\n\n".join(part for section in sections for part in section) + "\n"


_STEP_TEXT = (
    "Zeroing the gradients, forward, loss, backward and update with fused AdamW. A ratio is the median over a process's "
    f"rounds, each of which times {STEPS_PER_ROUND} steps of every form in turn, in alternating order; the table gives the "
    "median and the range over processes. *Ours* is `expand_(net, optimizer, MajorityKernels(k))`; *graph* mixes k kernels "
    "with a fresh draw inside every forward (`torch.nn.utils.parametrize`). k=1 is the cost of the mechanism itself."
)
_MEMORY_TEXT = (
    "The most that live tensors hold from making the network to the end of its third step, in MB. The bound is 1.05 times "
    "the plain peak with k kernels, their gradients and their two AdamW moments."
)
_TRAFFIC_TEXT = "Counted by a communication hook, in two processes."
_DEPLOYED_TEXT = (
    "After training and `collapse_`: the names in the state_dict, the bytes of `torch.save(net.state_dict())`, and the time "
    "of a forward in eval mode over the plain network's, interleaved as above."
)


def _preamble(results: dict[str, Any]) -> str:
    facts, settings = results["environment"], results["settings"]
    processes = f"{settings['processes']} separate processes" if settings["processes"] else "one trial, not a measurement"
    networks = [WORKLOADS[name].title for name in settings["models"]]
    return (
        f"Made by `{results['command']}`: {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, "
        + (f"{facts['accelerator']}, " if facts["accelerator"] else "")
        + f"{facts['system']}, Python {facts['python']}, torch {facts['torch']}; {processes}.\n\n"
        + "\n".join(f"- {network}" for network in networks)
    )


def _step_table(timing: Rows) -> str:
    lines = []
    for model, factor, rows in _grouped(timing):
        ours = [row["step_ratio"]["ours"] for row in rows]
        bound = STEP_BOUNDS.get((model, factor))
        lines.append(
            [
                model,
                str(factor),
                f"{median(row['step_ms']['plain'] for row in rows):.1f}",
                spread(ours),
                spread([row["step_ratio"]["graph"] for row in rows]),
                *_held(median(ours), bound, f"{bound:.2f}" if bound else ""),
            ]
        )
    return _table(["network", "k", "plain, ms", "ours / plain", "graph / plain", "bound", ""], lines)


def _memory_table(memory: Rows) -> str:
    lines = []
    for row in memory:
        peaks = [f"{row['peak'][form] / MEGABYTE:.1f}" for form in ("plain", "ours", "graph")]
        held = _held(row["peak"]["ours"], row["bound"], f"{row['bound'] / MEGABYTE:.1f}")
        lines.append([row["model"], str(row["factor"]), *peaks, *held])
    return _table(["network", "k", "plain", "ours", "graph", "bound", ""], lines)


def _traffic_table(traffic: Rows) -> str:
    lines = []
    for row in traffic:
        counts = row["bytes"]
        held = _held(abs(counts["ours"] - counts["plain"]), 0, "= plain")
        lines.append(
            [row["model"], str(row["factor"]), *(f"{counts[form]:,}" for form in ("plain", "ours", "graph")), *held]
        )
    return _table(["network", "k", "plain", "ours", "graph", "bound", ""], lines)


def _deployed_table(deployed: Rows, timing: Rows) -> str:
    latencies = {(model, factor): [row["latency_ratio"] for row in rows] for model, factor, rows in _grouped(timing)}
    lines = []
    for row in deployed:
        disk = row["disk_bytes"]
        same = row["same_keys"] and disk["ours"] == disk["plain"]
        lines.append(
            [
                row["model"],
                str(row["factor"]),
                "the same" if row["same_keys"] else "different",
                f"{disk['plain']:,}",
                f"{disk['ours']:,}",
                "pass" if same else "FAIL",
                spread(latencies[row["model"], row["factor"]]),
            ]
        )
    return _table(["network", "k", "keys", "plain, bytes", "ours, bytes", "", "latency, ours / plain"], lines)


def _grouped(timing: Rows) -> Iterable[tuple[str, int, Rows]]:
    """The rows of all processes, by network and number of kernels, in ascending order of the latter."""
    for model in dict.fromkeys(row["model"] for row in timing):
        for factor in sorted({row["factor"] for row in timing if row["model"] == model}):
            yield model, factor, [row for row in timing if (row["model"], row["factor"]) == (model, factor)]


def _held(value: float, bound: float | None, shown: str) -> tuple[str, str]:
    if bound is None:
        return "", ""
    return shown, "pass" if value <= bound else "FAIL"


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
