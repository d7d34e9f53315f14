"""Validation loss against training FLOPs: a wide language model from scratch, and grown in several ways.

    python benchmarks/growth.py [--text FILE] [--seeds 3] [--steps 3000] [--output benchmarks/results/growth]

Every run is a Lightning Trainer on ``LanguageModel`` over bytes, with AdamW and a cosine to zero over the run's own steps;
what grows, grows by ``DeepFusionGrow``. FLOPs are those of forward and backward as torch's counter gives them, times steps;
what donors cost is counted, or not, in columns of its own. Without --text the text is the standard library's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_sop import AtFraction, AtStep, DeepFusionGrow
from lightning_sop.zoo import LanguageModel, PythonSource
from lightning_sop.zoo.loading import SplitDataModule
from lightning_sop.zoo.python_source import TokenWindows

CONTEXT, BATCH, DEPTH = 64, 16, 2
SMALL, WIDE = {"width": 32, "heads": 2}, {"width": 64, "heads": 4}
RATE = 6e-3
OBSERVATIONS, VALIDATION_BATCHES = 30, 50  # validations of a run, and batches of each


class Text(SplitDataModule):
    """The bytes of one file: the last tenth for validation."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.batch_size, self.num_workers = BATCH, 0
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if path.endswith(".gz") else data
        text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        cut = len(text) * 9 // 10
        self._splits = {"train": TokenWindows(text[:cut], CONTEXT), "val": TokenWindows(text[cut:], CONTEXT)}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        method: what it is called in the table.
        seed: of initialization and order.
        steps: optimizer steps.
        grow: arguments of DeepFusionGrow but ``grown``; None trains from scratch.
        wide: whether it starts wide.
        donors: how many small networks of this seed are fused; 0 for the network itself.
    """

    method: str
    seed: int
    steps: int
    grow: dict[str, Any] | None = None
    wide: bool = False
    donors: int = 0


class Meter(pl.Callback):
    """FLOPs spent and validation loss, as the run goes on."""

    def __init__(self) -> None:
        self.flops = 0.0
        self.curve: list[tuple[float, float]] = []
        self._cost: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        size = sum(p.numel() for p in module.parameters())
        if size not in self._cost:
            self._cost[size] = step_flops(module, batch)
        self.flops += self._cost[size]

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.curve.append((self.flops, float(trainer.callback_metrics["val_loss"])))


def step_flops(module: pl.LightningModule, batch: Any) -> float:
    """Forward and backward of one batch."""
    twin = LanguageModel(**module.hparams)
    with FlopCounterMode(display=False) as counter:
        twin(batch[0]).sum().backward()
    return float(counter.get_total_flops())


def train(run: Run, text: str | None, folder: Path) -> dict[str, Any]:
    """Train, keep the final checkpoint, and return the curve."""
    quiet()
    pl.seed_everything(1000 + run.seed, verbose=False)
    settings = {"context": CONTEXT, "depth": DEPTH, "lr": RATE, **(WIDE if run.wide else SMALL)}
    module, meter = LanguageModel(**settings), Meter()
    callbacks: list[pl.Callback] = [meter]
    if run.grow is not None:
        arguments = dict(run.grow)
        if run.donors:
            arguments["donors"] = [str(folder / f"small-{run.seed}-{donor}.ckpt") for donor in range(run.donors)]
        callbacks.insert(0, DeepFusionGrow(grown=WIDE, verbose=False, **arguments))
    trainer = pl.Trainer(
        max_steps=run.steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=VALIDATION_BATCHES,
        gradient_clip_val=1.0,
        val_check_interval=max(1, run.steps // OBSERVATIONS),
        check_val_every_n_epoch=None,
        callbacks=callbacks,
    )
    trainer.fit(module, Text(text) if text else PythonSource(CONTEXT, BATCH, 1_000_000))
    trainer.save_checkpoint(folder / f"{run.method}-{run.seed}.ckpt")
    return {"method": run.method, "seed": run.seed, "steps": run.steps, "flops": meter.flops, "curve": meter.curve}


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def plan(seeds: int, steps: int) -> tuple[list[Run], list[Run]]:
    """Donors first, then everything else."""
    third = steps // 3
    donors = [Run(f"small-{seed}-{donor}", seed + 100 * donor, third) for seed in range(seeds) for donor in range(2)]
    kept: dict[str, Any] = {"learning_rate": "keep", "schedule": AtFraction(0.5)}
    halfway = {
        "two unequal copies at 1/2, rates kept": kept,
        "two unequal copies at 1/2, rates matched": {**kept, "learning_rate": "match"},
        "two equal copies with noise at 1/2 (Net2Net)": {**kept, "weights": [0.5, 0.5], "off_diagonal": 0.02},
    }
    others = []
    for seed in range(seeds):
        others.append(Run("wide from scratch", seed, steps, wide=True))
        for rate in ("keep", "match"):
            name = f"two donors fused, rates {'kept' if rate == 'keep' else 'matched'}"
            grow = {"learning_rate": rate, "schedule": AtStep(0)}
            others.append(Run(name, seed, steps * 2 // 3, grow, donors=2))
        others += [Run(name, seed, steps, grow) for name, grow in halfway.items()]
    return donors, others


def work(task: tuple[Run, str | None, str]) -> dict[str, Any]:
    run, text, folder = task
    return train(run, text, Path(folder))


def summarize(results: Sequence[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """One row for each method: final loss, and FLOPs until the wide network's final loss, over seeds."""
    by = {(r["method"], r["seed"]): r for r in results}
    methods = list(dict.fromkeys(r["method"] for r in results if not r["method"].startswith("small-")))
    rows = []
    for method in methods:
        finals, shares, with_donors = [], [], []
        for seed in range(seeds):
            run, wide = by[method, seed], by["wide from scratch", seed]
            target, budget = wide["curve"][-1][1], wide["flops"]
            theirs = [r["flops"] for r in results if r["method"].startswith(f"small-{seed}-")]
            donors = sum(theirs) if "donors" in method else 0.0
            reached = next((flops for flops, loss in run["curve"] if loss <= target), math.inf)
            finals.append(run["curve"][-1][1])
            shares.append(reached / budget)
            with_donors.append((reached + donors) / budget)
        rows.append({"method": method, "final": finals, "share": shares, "share_with_donors": with_donors})
    return rows


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and 95 % interval (Student's t) over seeds; what never got there counts as infinite."""
    if any(math.isinf(value) for value in values):
        reached = [f"{value:.2f}" for value in values if not math.isinf(value)]
        return f"not reached by {len(values) - len(reached)} of {len(values)}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.26)
    half = t * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def render(document: dict[str, Any]) -> str:
    lines = [
        "# Loss against FLOPs: grown and from scratch",
        "",
        f"Made by `{document['command']}` ({document['machine']}). LanguageModel over bytes, depth {DEPTH}, "
        f"context {CONTEXT}, batch {BATCH}; width {SMALL['width']} grown to {WIDE['width']};",
        f"AdamW {RATE}, cosine to zero over each run's own steps; {document['seeds']} seeds, mean ± 95 % interval. Text: "
        f"{document['text']}.",
        "",
        "*FLOPs to the goal*: until the validation loss is that of the wide network's last step, over the FLOPs of that",
        "whole run (aim: at most 0.60 without, 0.85 with the donors' own training).",
        "",
        "| method | final validation loss | FLOPs to the goal | with donors' training |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['method']} | {spread(row['final'])} | {spread(row['share'], 2)} | {spread(row['share_with_donors'], 2)} |"
        for row in document["rows"]
    ]
    return "\n".join([*lines, "", "![curves](growth.png)", ""])


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    shown = [r for r in results if not r["method"].startswith("small-")]
    colors = {method: f"C{n}" for n, method in enumerate(dict.fromkeys(r["method"] for r in shown))}
    for result in shown:
        label = result["method"] if result["seed"] == 0 else None
        axes.plot(*zip(*result["curve"], strict=True), color=colors[result["method"]], label=label, alpha=0.7)
    axes.set(xlabel="FLOPs of this run (donors not counted)", ylabel="validation loss", yscale="log")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train everything, write OUTPUT.json, OUTPUT.md and OUTPUT.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a text file, plain or .gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "growth")
    options = parser.parse_args()
    donors, others = plan(options.seeds, options.steps)
    results = []
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for runs in (donors, others):
            for result in pool.imap(work, [(run, options.text, folder) for run in runs]):
                results.append(result)
                print(f"{result['method']} seed {result['seed']}: {result['curve'][-1][1]:.4f}", file=sys.stderr, flush=True)
            for donor in donors:  # by the number of the pair, whatever their seeds
                saved = Path(folder, f"{donor.method}-{donor.seed}.ckpt")
                if saved.exists():
                    saved.rename(Path(folder, f"{donor.method}.ckpt"))
    document = {
        "command": shlex.join(["python", "benchmarks/growth.py", *(Path(word).name for word in sys.argv[1:])]),
        "machine": f"{platform.system()}, torch {torch.__version__}",
        "text": Path(options.text).name if options.text else "the standard library's source, 1 MB",
        "seeds": options.seeds,
        "rows": summarize(results, options.seeds),
        "runs": results,
        "plan": [{k: str(v) for k, v in asdict(run).items()} for run in [*donors, *others]],
    }
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(render(document))
    plot(results, options.output.with_suffix(".png"))
    print(render(document))


if __name__ == "__main__":
    main()
