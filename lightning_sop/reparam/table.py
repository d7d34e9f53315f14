"""A plan as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from lightning_sop.reparam.select import Plan


def plan_table(plan: Plan) -> Table:
    """Every parameter, what becomes of it, counts, and the reason for each that stays plain."""
    plain, trained = plan.numel
    table = Table(title="Simulated over-parametrization", title_justify="left")
    for column, justify in (
        ("parameter", "left"),
        ("layer", "left"),
        ("shape", "left"),
        ("trained as", "left"),
        ("deployed", "right"),
        ("training", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in plan.rows:
        trained_as = row.method.describe() if row.method else "plain"
        table.add_row(
            "\n= ".join(row.names),
            row.layer,
            "x".join(map(str, row.site.shape)) or "scalar",
            f"{trained_as}: {row.reason}" if row.reason else trained_as,
            f"{row.numel:,}",
            f"{row.trained_numel:,}",
            style=None if row.method else "dim",
        )
    table.add_section()
    table.add_row("total", "", "", f"{len(plan.converted)} of {len(plan.rows)} tensors", f"{plain:,}", f"{trained:,}")
    return table
