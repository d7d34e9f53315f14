"""What runs cost, with the networks that they were made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

COSTS = ("steps", "seconds", "flops", "cpu_seconds", "wall_seconds")


def spent(result: Mapping[str, Any], name: str) -> float | None:
    """One of the costs of a run together with its teachers; None where it is not known."""
    return total([result["cost"][name], result["cost"].get("teachers", {}).get(name, 0)])


def total(parts: Iterable[float | None]) -> float | None:
    """The sum, if all parts are known."""
    known = list(parts)
    return None if None in known else sum(part for part in known if part is not None)
