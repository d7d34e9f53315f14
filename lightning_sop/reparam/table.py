"""A plan as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from lightning_sop.reparam.select import Plan, PlanRow


def plan_table(plan: Plan, *, brief: bool = False) -> Table:
    """Every parameter, what becomes of it, counts before and after, and the reason for each that stays plain.

    Args:
        plan: what to show.
        brief: put the parameters that stay plain together by reason.
    """
    table = Table(title="Simulated over-parametrization", title_justify="left")
    for column in ("parameter", "layer", "shape", "trained as"):
        table.add_column(column, overflow="fold")
    for column in ("deployed", "training"):
        table.add_column(column, justify="right")
    plain_rows = [row for row in plan.rows if row.method is None]
    for row in [row for row, _ in plan.converted] if brief else plan.rows:
        table.add_row(*_cells(row), style=None if row.method else "dim")
    for reason in dict.fromkeys(row.reason for row in plain_rows) if brief else ():
        rows = [row for row in plain_rows if row.reason == reason]
        table.add_row(f"{len(rows)} more", "", "", f"plain: {reason}", *_counts(rows), style="dim")
    table.add_section()
    table.add_row("total", "", "", f"{len(plan.converted)} of {len(plan.rows)} tensors", *_counts(plan.rows))
    return table


def _cells(row: PlanRow) -> list[str]:
    trained_as = row.method.describe() if row.method else "plain"
    return [
        "\n= ".join(row.names),
        row.layer,
        "x".join(map(str, row.site.shape)) or "scalar",
        f"{trained_as}: {row.reason}" if row.reason else trained_as,
        *_counts([row]),
    ]


def _counts(rows: Iterable[PlanRow]) -> list[str]:
    rows = list(rows)
    return [f"{sum(row.numel for row in rows):,}", f"{sum(row.trained_numel for row in rows):,}"]
