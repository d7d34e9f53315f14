"""Is implicit regularization what Majority Kernels does? Runs of a study's rows once more, measured along the way."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.quality.config import Study, StudyError, Task, Variant
from benchmarks.quality.place import Place
from benchmarks.quality.plan import Results, Run, finals
from benchmarks.quality.probe import BATCHES, Probe
from benchmarks.quality.table import NOTHING, head, line

Row = Mapping[str, float]


def why(study: Study, results: Results, place: Place, folder: Path, command: str) -> list[Path]:
    """Train a network of each row again, with its chosen setting and the first seed, and write what was measured.

    Rows that are written already with the same setting are not trained again. The page has all tasks that were measured.

    Returns:
        For each task its measurements and a picture; last the page.

    Raises:
        StudyError: a setting is not chosen yet, or a row is made of other networks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in study.tasks.values():
        data, picture = (folder / f"why_{study.name}_{task.name}.{suffix}" for suffix in ("json", "png"))
        known = read(data)["rows"] if data.exists() else {}
        document = {"study": study.name, "task": task.name, "title": task.title, "seed": study.seeds[0]}
        rows: dict[str, Any] = {}
        for variant in study.known.values():
            run = _first_run(study, task, variant, results)
            row = known.get(variant.name)
            if variant.name in study.variants and (row is None or row["key"] != run.key):
                measured = follow(run, place)
                row = {"key": run.key, "setting": run.setting, "commit": place.commit, "measured": measured}
                known[variant.name] = {**row, "title": study.title_of(variant)}
                write(data, {**document, "rows": known})  # in case of a kill
            if row is not None and row["key"] == run.key:
                rows[variant.name] = {**row, "title": study.title_of(variant)}
        write(data, {**document, "rows": rows})
        draw({**document, "rows": rows}, picture)
        written += [data, picture]
    page = folder / f"why_{study.name}.md"
    documents = [read(path) for path in sorted(folder.glob(f"why_{study.name}_*.json"))]
    own = [document for document in documents if document["study"] == study.name]  # another's name may begin with this one's
    page.write_text("\n".join(render(study.title, own, command)) + "\n")
    return [*written, page]


def read(path: Path) -> dict[str, Any]:
    """What was measured.

    Raises:
        StudyError: the file is damaged.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}); restore or remove it, and its runs are measured again") from error
    return dict(document)


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write what was measured, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


def _first_run(study: Study, task: Task, variant: Variant, results: Results) -> Run:
    runs = finals(study, task, variant, results)
    if runs is None:
        raise StudyError(f"{task.name}: the setting of {variant.name} is not chosen yet; run the study first")
    run = runs[study.seeds[0]]
    if run.needs or "derive" in run.config:
        raise StudyError(f"{task.name}: {variant.name} is made of other networks, and cannot be followed")
    return run


def follow(run: Run, place: Place) -> list[dict[str, float]]:
    """What was measured along one run."""
    from benchmarks.quality.build import build
    from benchmarks.quality.train import fit

    cli = build(run.config, place, run.seed)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    own = cli.datamodule.train_dataloader()
    order = torch.Generator().manual_seed(0)
    loader: DataLoader[Any] = DataLoader(
        own.dataset, own.batch_size, shuffle=True, generator=order, collate_fn=own.collate_fn
    )
    probe = Probe(list(itertools.islice(loader, BATCHES)))
    cli.trainer.callbacks.append(probe)  # type: ignore[attr-defined]
    fit(cli.trainer, cli.model, cli.datamodule, run.seed)
    return probe.rows


# ---------------------------------------------------------------------- for readers


def render(title: str, documents: Sequence[Mapping[str, Any]], command: str) -> list[str]:
    """The page: each task's rows in numbers, of the middle half of the run, where rates are neither first nor last ones."""
    page = [
        f"# {title}",
        "",
        f"`{command}`",
        "",
        f"One run of each row, with the same seed. Measured at the collapsed weights on {BATCHES} batches of training data,"
        " in evaluation mode (BatchNorm with their statistics); medians over the middle half of the run. E‖g‖²: of a batch,"
        " over that of the first row, at the same epochs and where that one has the same training loss. Excess: mean loss"
        " over mixes minus that of the mean kernel, by finite differences. Predicted: ¼ (A - 1) Σ hⱼ E gⱼ². A - 1 measured:"
        " what the curvature amounts to, 4 (½ tr(HC) + decay) / Σ hⱼ E gⱼ².",
    ]
    columns = ["", "training loss", "E‖g‖²", "at equal loss"]
    columns += ["excess", "½ tr(HC)", "predicted", "A - 1 of the draw", "A - 1 measured"]
    for document in documents:
        rows = list(document["rows"].values())
        first = middle(rows[0]["measured"])
        page += ["", f"## {document['title']}", "", f"![](why_{document['study']}_{document['task']}.png)", ""]
        page += head(columns)
        for row in rows:
            found = middle(row["measured"])
            relative = found["batch_gradient"] / first["batch_gradient"], at_equal_loss(row["measured"], rows[0]["measured"])
            cells = [row["title"], f"{found['loss']:.4f}", *(f"{value:.2f}" for value in relative)]
            if "amplification" in found:
                cells += [f"{found[key]:.2g}" for key in ("gap", "curvature", "predicted_own_rates")]
                cells += [f"{found['amplification'] - 1:.2f}", f"{found['measured']:.2f}"]
            page.append(line(cells + [NOTHING] * (len(columns) - len(cells))))
    return page


def middle(measured: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the middle half of a run."""
    last = measured[-1]["epoch"]
    rows = [_amplified(row) for row in measured if last / 4 <= row["epoch"] <= 3 * last / 4] or [_amplified(measured[-1])]
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def at_equal_loss(measured: Sequence[Row], first: Sequence[Row]) -> float:
    """Median ratio of E‖g‖² to that of another run where it has the same training loss; NaN where it never has.

    Between measurements logarithms are interpolated, or losses as they are if some are not above 0.
    """
    scale = math.log if all(row["loss"] > 0 for row in (*first, *measured)) else float
    known = sorted((scale(row["loss"]), math.log(row["batch_gradient"])) for row in first)
    losses, gradients = zip(*known, strict=True)
    last = measured[-1]["epoch"]
    ratios = []
    for row in measured:
        loss = scale(row["loss"])
        if last / 4 <= row["epoch"] <= 3 * last / 4 and losses[0] <= loss <= losses[-1]:
            ratios.append(row["batch_gradient"] / math.exp(np.interp(loss, losses, gradients)))
    return statistics.median(ratios) if ratios else math.nan


def _amplified(row: Row) -> dict[str, float]:
    """With A - 1 as the measured curvature has it."""
    if "curvature" not in row:
        return dict(row)
    return {**row, "measured": 4 * (row["curvature"] + row["decay"]) / row["preconditioned"]}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Gradients of all networks; measured and predicted excess of the loss for each with kernels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(document["rows"].values())
    kernels = [row for row in rows if "curvature" in row["measured"][0]]
    figure, axes = pyplot.subplots(1, 1 + len(kernels), figsize=(5 * (1 + len(kernels)), 4), squeeze=False)
    for number, row in enumerate(rows):
        epochs = [one["epoch"] for one in row["measured"]]
        axes[0, 0].plot(epochs, [one["batch_gradient"] for one in row["measured"]], f"C{number}-o", ms=3, label=row["title"])
        axes[0, 0].plot(epochs, [one["gradient"] for one in row["measured"]], f"C{number}--")
    axes[0, 0].set(yscale="log", title=f"‖g‖²: of a batch (line), of {BATCHES} (dashes)")
    lines = (
        ("gap", "C0-s", "mean loss over mixes, minus that of the mean"),
        ("curvature", "C1-o", "½ tr(HC)"),
        ("predicted", "C2--", "(h/4)(A - 1) E‖g‖²"),
        ("predicted_own_rates", "C3--", "¼ (A - 1) Σ hⱼ E gⱼ²"),
    )
    for axis, row in zip(axes[0, 1:], kernels, strict=True):
        for key, style, label in lines:
            shown = [(one["epoch"], one[key]) for one in row["measured"] if one[key] > 0]
            axis.plot(*zip(*shown, strict=True), style, ms=3, label=label) if shown else None
        axis.set(yscale="log", title=row["title"])
    for axis in axes[0]:
        axis.set(xlabel="epoch")
        axis.legend(fontsize="x-small")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{document['task']}, seed {document['seed']}", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
