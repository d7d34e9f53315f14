"""What the name of a metric says: its section, quantity and layer, its unit, and which direction is better."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lightning_sop.dynamics.quantities import SECTIONS, TABLE, find

GROWTH, OWN, RATES = "growth", "own", "rates"

TITLES = {OWN: "Training, validation, test", RATES: "Learning rates", **SECTIONS}
"""Headings of sections; others have the first part of their names."""

EVENT_KEYS = ("event", "gap", "parameters", "grow", "nu", "T")
"""Of ``growth/…``: what is logged when a network grows, or when growing was tried out on copies, and at no other time."""

GROWN_KEYS = ("event", "gap", "parameters")
"""Those that are logged when it grows."""

_STAGES = frozenset({"train", "training", "val", "valid", "validation", "test", "eval", "metrics", "step", "epoch"})
_LOWER = re.compile(r"loss|error|perplexity|ppl|nll|bpc|bpb|mse|mae|rmse|\bwer\b|\bcer\b|\bfid\b|entropy|divergence", re.I)
_HIGHER = re.compile(r"acc|f1|auc|auroc|precision|recall|bleu|rouge|dice|iou|\bmap\b|psnr|ssim|\br2\b|score|reward", re.I)

Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Metric:
    """What is known of a metric by its name.

    Attributes:
        name: as logged.
        section: the part before the first slash; ``"own"`` for training, validation and test, ``"rates"`` for learning
            rates.
        quantity: what is measured, without section and layer.
        layer: path of the layer; empty where the metric is not of a layer.
        unit: of its values; empty where unknown, ``1`` for pure numbers.
        text: one sentence; empty where unknown.
        better: which direction is better.
        rank: place in the table of quantities; those that are not in it come last.
    """

    name: str
    section: str
    quantity: str
    layer: str = ""
    unit: str = ""
    text: str = ""
    better: Better = ""
    rank: int = len(TABLE)


_RANKS = {row.name: rank for rank, row in enumerate(TABLE)}


@lru_cache(maxsize=100_000)
def describe(name: str) -> Metric:
    """Everything that a metric's name says; names of this package are those of the table of quantities."""
    row = find(name)
    if row is not None:
        section, _, quantity = row.name.partition("/")
        rest = name.split("/", row.name.count("/") + 1)
        layer = rest[-1] if len(rest) > row.name.count("/") + 1 else ""
        if "{" in row.name or (layer and row.per == "donor"):
            quantity = name.partition("/")[2].removesuffix(f"/{layer}" if row.per == "layer" and layer else "")
        layer = layer if row.per == "layer" else ""
        return Metric(name, section, quantity, layer, row.unit, row.description, rank=_RANKS[row.name])
    section, quantity, layer = _split(name)
    better: Better = "" if layer else "lower" if _LOWER.search(name) else "higher" if _HIGHER.search(name) else ""
    return Metric(name, section, quantity, layer, better=better)


def is_ours(name: str) -> bool:
    """Whether callbacks of this package log under such a name."""
    return find(name) is not None


def natural(text: str) -> list[tuple[int, str]]:
    """Sorting key by which ``net.2`` comes before ``net.10``."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", text) if part]


def _split(name: str) -> tuple[str, str, str]:
    """Section, quantity and layer. A name of three parts is a layer's, unless it begins with a stage of the run."""
    section, slash, rest = name.partition("/")
    if section.startswith("lr-"):  # of Lightning's LearningRateMonitor, perhaps with the number of a parameter group
        return RATES, name, ""
    if not slash or not section or section.lower() in _STAGES:
        return OWN, name, ""
    quantity, slash, layer = rest.partition("/")
    return (section, quantity, layer) if slash and quantity and layer else (section, rest, "")
