"""Pictures of a study."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.config import PLAIN, Study
from benchmarks.quality.stats import paired

if TYPE_CHECKING:
    from benchmarks.quality.table import Row

Table = Mapping[str, Mapping[str, "Row"]]
OUTLYING = 10
"""Rows whose difference to plain is so many times the median one are named at the edge: they would hide all others."""
KEY_COLOURS = {"plain": "black", "Majority Kernels": "C3"}


def plot(study: Study, table: Table, folder: Path) -> list[str]:
    """Write the pictures that there are results for.

    Returns:
        Their names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, draw in (("differences", _differences), ("costs", _costs), ("curves", _curves)):
        figure = draw(table)
        path = folder / f"{study.name}_{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # of other results
            continue
        if figure.get_layout_engine() is None:
            figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path.name)
    return written


def _style(row: Row) -> dict[str, Any]:
    """Plain in black, Majority Kernels in red, references in grey, all others in blue."""
    if row.variant.method == PLAIN:
        return {"color": "black"}
    if row.variant.method.startswith("majority_kernels"):
        return {"color": "C3"}
    return {"color": "0.55" if "reference" in row.title else "C0"}


def _compared(table: Table) -> dict[str, list[tuple[Row, Row]]]:
    """By task: rows with at least two seeds in common with what they are compared with."""
    found: dict[str, list[tuple[Row, Row]]] = {}
    for task, rows in table.items():
        pairs = [(row, rows[row.variant.against]) for row in rows.values() if row.variant.against in rows]
        found[task] = [(row, other) for row, other in pairs if row is not other and len(row.done.keys() & other.done) > 1]
    return {task: pairs for task, pairs in found.items() if pairs}


def _differences(table: Table) -> Any:
    """Test loss and score minus those of the plain network, with intervals."""
    from matplotlib import pyplot

    from benchmarks.quality.table import score_form, score_name

    shown = _compared(table)
    if not shown:
        return None
    heights = [0.7 + 0.24 * len(pairs) for pairs in shown.values()]
    figure, axes = pyplot.subplots(
        len(shown), 2, figsize=(10, sum(heights)), squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    for (task, pairs), (left, right) in zip(shown.items(), axes, strict=True):
        label, factor, _ = score_form(pairs[0][0].task)
        higher = pairs[0][0].task.higher
        metrics = ((left, "test_loss", 1.0, "test loss", False), (right, "", factor, f"test {label}", higher))
        to = "plain" if all(row.variant.against == PLAIN for row, _ in pairs) else "its pair"
        for axis, metric, scale, title, higher in metrics:
            found = {}
            for place, (row, other) in enumerate(reversed(pairs)):
                name = metric or score_name(row.task)
                difference = paired(row.metric(name), other.metric(name))
                if difference is not None:
                    found[place] = row, scale * difference.mean, scale * difference.half
            limit = _limit([abs(mean) + half for _, mean, half in found.values()])
            for place, (row, mean, half) in found.items():
                if abs(mean) > limit:
                    text, x = (f"{mean:+.3g} →", 0.98) if mean > 0 else (f"← {mean:+.3g}", 0.02)
                    side = "right" if mean > 0 else "left"
                    axis.text(
                        x, place, text, transform=axis.get_yaxis_transform(), ha=side, va="center", fontsize=8, **_style(row)
                    )
                else:
                    axis.errorbar(mean, place, xerr=half, fmt="o", ms=4, capsize=3, **_style(row))
            axis.axvline(0, color="black", linewidth=0.8)
            axis.grid(axis="x", alpha=0.3)
            axis.tick_params(labelsize="small")
            axis.set_title(f"{task}: {title} minus {to}'s ({'right' if higher else 'left'} is better)", fontsize=8.5)
        left.set_ylim(-0.7, len(pairs) - 0.3)
        left.set_yticks(range(len(pairs)), [_label(row) for row, _ in reversed(pairs)])
    return figure


def _limit(extents: Sequence[float]) -> float:
    """Beyond it, values are outlying."""
    return OUTLYING * statistics.median(extents) if extents else math.inf


def _label(row: Row) -> str:
    return row.title if len(row.done) == row.seeds else f"{row.title}, {len(row.done)} seeds"


def _panels(count: int, height: float, below: int) -> tuple[Any, list[Any]]:
    """A figure with so many axes, two in a line, and room for some lines below them."""
    from matplotlib import pyplot

    columns = min(2, count)
    lines = math.ceil(count / columns)
    size = (max(7.5, 5.5 * columns), height * lines + 0.2 * below)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def _costs(table: Table) -> Any:
    """Test loss against FLOPs, teachers included; the mean over seeds. Rows have the same number in all panels."""
    shown = {
        task: [row for row in rows.values() if row.cost("flops") > 0]
        for task, rows in table.items()
        if PLAIN in rows and rows[PLAIN].cost("flops") > 0
    }
    shown = {task: rows for task, rows in shown.items() if len(rows) > 2}
    if not shown:
        return None
    names = list(dict.fromkeys(row.title for rows in shown.values() for row in rows))
    figure, axes = _panels(len(shown), 3.6, 1 + math.ceil(len(names) / 3))
    for (task, rows), axis in zip(shown.items(), axes, strict=True):
        unit = table[task][PLAIN].cost("flops")
        losses = {row.title: statistics.mean(row.metric("test_loss").values()) for row in rows}
        plain = losses[table[task][PLAIN].title]
        limit = _limit([abs(loss - plain) for loss in losses.values() if loss != plain])
        for row in rows:
            x, y, number = row.cost("flops") / unit, losses[row.title], str(names.index(row.title) + 1)
            if abs(y - plain) > limit:
                axis.text(x, 0.97, f"{number}: {y:.3g} ↑", transform=axis.get_xaxis_transform(), va="top", fontsize="small")
                axis.update_datalim([(x, plain)])
            else:
                axis.plot(x, y, "o", ms=5, **_style(row))
                axis.annotate(number, (x, y), (4, 4), textcoords="offset points", fontsize="small")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.margins(0.12)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize="small")
        axis.set_title(f"{task}: test loss, by FLOPs of training in those of plain", fontsize="small")
    texts = [f"{number} {name}" for number, name in enumerate(names, start=1)]
    styles = {row.title: _style(row) for rows in shown.values() for row in rows}
    figure.legend([_line("o", **styles[name]) for name in names], texts, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _curves(table: Table) -> Any:
    """Validation loss by epoch, the median over seeds."""
    from matplotlib import pyplot

    shown = {task: [row for row in rows.values() if _curve(row)] for task, rows in table.items()}
    shown = {task: rows for task, rows in shown.items() if rows}
    if not shown:
        return None
    names = list(dict.fromkeys(row.title for rows in shown.values() for row in rows))
    others = [name for name in names if name not in KEY_COLOURS]
    free = [colour for number, colour in enumerate(pyplot.get_cmap("tab20").colors) if number not in (6, 7)]  # type: ignore[attr-defined]
    colours = {**KEY_COLOURS, **{name: free[number % len(free)] for number, name in enumerate(others)}}
    figure, axes = _panels(len(shown), 3.6, 1 + math.ceil(len(names) / 3))
    for (task, rows), axis in zip(shown.items(), axes, strict=True):
        curves = {row.title: _curve(row) for row in rows}
        for title, curve in curves.items():
            axis.plot(range(1, len(curve) + 1), curve, color=colours[title], linewidth=2 if title in KEY_COLOURS else 1)
        lowest = min(min(curve) for curve in curves.values())
        highest = max(curve[-1] for curve in curves.values())
        axis.set_ylim(lowest - 0.03 * abs(lowest), max(highest + 0.05 * abs(highest), lowest + 0.4 * abs(lowest)))
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize="small")
        axis.set_title(f"{task}: validation loss by epoch, median over seeds", fontsize="small")
    handles = [_line("-", color=colours[name], linewidth=2 if name in KEY_COLOURS else 1) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _line(style: str, **options: Any) -> Any:
    from matplotlib.lines import Line2D

    marker = {"linestyle": "", "marker": style} if style == "o" else {"linestyle": style}
    return Line2D([], [], **{**marker, **options})


def _curve(row: Row) -> list[float]:
    curves = [result["metrics"]["curve"]["val_loss"] for result in row.done.values() if "curve" in result["metrics"]]
    # early stopping may have ended some before others
    by_epoch = itertools.zip_longest(*curves)
    return [statistics.median(value for value in values if value is not None) for values in by_epoch]
