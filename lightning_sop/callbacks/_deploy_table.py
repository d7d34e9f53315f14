"""What a run has deployed, for readers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rich.table import Table

_MOST = 10


def deploy_table(receipts: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each deploy file, the latest last; of many only these.

    Args:
        receipts: by path.
    """
    folders = {os.path.dirname(path) for path in receipts}
    where = _short(folders.pop()) if len(folders) == 1 else ""
    table = Table(title="Deployed" + f" in {where}" * bool(where), title_justify="left")
    table.add_column("file", overflow="fold")
    for column in ("step", "values", "MB", "difference of outputs"):
        table.add_column(column, justify="right")
    hidden = len(receipts) - _MOST
    if hidden > 0:
        table.add_row(f"{hidden} earlier ones", style="dim")
    for path, receipt in list(receipts.items())[-_MOST:]:
        step, difference = receipt["global_step"], receipt["output_difference_relative"]
        table.add_row(
            os.path.basename(path) if where else _short(path),
            "" if step is None else f"{step:,}",
            f"{receipt['values']:,}",
            f"{receipt['bytes'] / 1e6:.3g}",
            "not compared" if difference is None else f"{difference:.1e}",
        )
    return table


def _short(path: str) -> str:
    """From the working directory, for what is in it."""
    inside = os.path.abspath(path).startswith(os.path.join(os.getcwd(), ""))
    return os.path.relpath(path) if inside else path
