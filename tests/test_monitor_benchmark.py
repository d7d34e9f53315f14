"""The script that times DynamicsMonitor, at its smallest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts import load_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = load_script(BENCHMARKS / "monitor.py", "monitor")
    random_state = torch.get_rng_state()
    yield module
    torch.set_rng_state(random_state)


@pytest.mark.filterwarnings("ignore")
def test_the_table_is_written(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--quick", "--model", "mlp", "--output", str(tmp_path / "new" / "table")]) == 0
    results = json.loads((tmp_path / "new" / "table.json").read_text())
    page = (tmp_path / "new" / "table.md").read_text()
    assert results["command"] in page and "one trial, not a measurement" in page
    assert "Overhead of DynamicsMonitor" in capsys.readouterr().out
    (row,) = results["timing"]
    kinds = ["plain", "idle", "default", "default, slow", "all", "all, slow"]
    assert list(row["step_ms"]) == kinds and row["step_ratio"]["plain"] == 1
    assert all(f"| {kind} |" in page for kind in kinds)
    assert "| default | " in page and "| everything, every step | " in page


def test_what_a_run_costs_is_the_mean_over_its_steps(script: Any) -> None:
    ratios = {"idle": 1.0, "default": 1.5, "default, slow": 4.0}
    assert script.mean_of(ratios, "default", every=10, slow=5) == pytest.approx((1 * 4.0 + 4 * 1.5 + 45 * 1.0) / 50)
    assert script.mean_of(ratios, "default", every=1, slow=1) == 4.0


def test_a_bound_that_is_missed_is_said(script: Any) -> None:
    facts = {"processor": "x", "cores": 2, "threads": 2, "load_average": [0.5], "system": "s", "python": "3", "torch": "2"}
    steps = {"plain": 1.0}
    row = {"step_ms": steps, "step_ratio": steps, "run_ratio": {"default": 1.01, "everything, every step": 1.2}}
    settings = {"processes": 3, "model": "mlp"}
    page = script.render({"command": "c", "environment": facts, "settings": settings, "timing": [row]})
    assert "| default | 1.010 (1.010 to 1.010) | 1.02 | pass |" in page
    assert "| everything, every step | 1.200 (1.200 to 1.200) | 1.10 | FAIL |" in page
