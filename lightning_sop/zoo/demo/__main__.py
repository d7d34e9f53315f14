"""Runs the demo from the command line."""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from lightning_sop.zoo.demo.experiment import Run, Setting, step_time_ratio, train
from lightning_sop.zoo.demo.report import draw_curves, make_table


def main(args: Sequence[str] | None = None) -> int:
    """Train both arms with every seed, print one table, write ``curves.png``.

    Args:
        args: the words after the program's name; those of this process by default.

    Returns:
        The exit status, 0.
    """
    defaults = Setting()
    parser = argparse.ArgumentParser(prog="python -m lightning_sop.zoo.demo", description=__doc__)
    parser.add_argument(
        "--seeds", type=_at_least(2), default=10, help="trainings per arm, at least 2 (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=_at_least(1), default=defaults.epochs, help="(default: %(default)s)")
    parser.add_argument("--width", type=_at_least(1), default=defaults.width, help="hidden units (default: %(default)s)")
    parser.add_argument("--factor", type=_at_least(1), default=defaults.factor, help="kernels (default: %(default)s)")
    parser.add_argument("--blocks", type=_at_least(1), default=60, help="timed blocks of steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    options = parser.parse_args(args)
    setting = Setting(width=options.width, factor=options.factor, epochs=options.epochs)
    silence_lightning()

    console = Console()
    plain: list[Run] = []
    majority: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in track(range(options.seeds), "training", console=console, transient=True):
            plain.append(train(setting, seed, False, Path(folder, f"plain-{seed}")))
            majority.append(train(setting, seed, True, Path(folder, f"majority-{seed}")))
    ratio = step_time_ratio(setting, options.blocks)
    console.print(make_table(setting, plain, majority, ratio))
    figure = options.output / "curves.png"
    draw_curves(plain, majority, figure)
    console.print(f"curves: {figure}")
    return 0


def silence_lightning() -> None:
    """Keep Lightning's start-up lines, many times over, out of the demo's one table."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # data of this size are in memory: reading processes would only cost time
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning 2.6 asks torch 2.13 in a way that torch deprecates
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")


def _at_least(minimum: int) -> Callable[[str], int]:
    def bounded(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return bounded


if __name__ == "__main__":
    sys.exit(main())
