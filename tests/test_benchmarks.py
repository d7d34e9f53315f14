"""The benchmark's script at its smallest: its files, and the counts in them that do not depend on the machine."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.scripts import load_script

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    random_state = torch.get_rng_state()
    yield
    torch.set_rng_state(random_state)


def load(name):
    return load_script(BENCHMARKS / f"{name}.py", name)


@pytest.fixture
def overhead():
    return load("overhead")


@pytest.fixture
def growth():
    return load("growth")


def test_the_overhead_table_is_written_and_its_counts_hold(overhead, tmp_path, capsys):
    assert overhead.main(["--quick", "--models", "mlp", "--factors", "4", "--output", str(tmp_path / "new" / "table")]) == 0
    results = json.loads((tmp_path / "new" / "table.json").read_text())
    page = (tmp_path / "new" / "table.md").read_text()

    assert results["command"].startswith("python benchmarks/overhead.py --quick")
    assert results["command"] in page
    assert "one trial, not a measurement" in page
    assert "Overhead of Majority Kernels" in capsys.readouterr().out
    for part in ("timing", "memory", "traffic", "deployed"):
        assert [row["factor"] for row in results[part]] == [1, 4]
    for row in results["memory"]:
        assert row["peak"]["plain"] < row["peak"]["ours"] <= row["bound"]
    weights = 4 * (784 * 1024 + 1024 * 1024 + 1024 * 10)
    plain = weights + 4 * (1024 + 1024 + 10)
    for row in results["traffic"]:
        assert row["bytes"] == {"plain": plain, "ours": plain, "graph": plain + (row["factor"] - 1) * weights}
    for row in results["deployed"]:
        assert row["same_keys"] and row["disk_bytes"]["ours"] == row["disk_bytes"]["plain"]


def test_memory_is_counted_by_storage_and_until_it_is_freed():
    from measures.memory import LiveTensors

    with LiveTensors() as tensors:
        kept = torch.zeros(1000)
        view = kept[:10]
        gone = torch.ones(500)
        del gone
        kept.add_(1)
        assert (tensors.live, tensors.peak) == (4000, 6000)
        del kept
        assert tensors.live == 4000  # a view keeps the whole storage
        del view
        assert tensors.live == 0


def test_memory_counts_what_a_backward_needs():
    from measures.memory import LiveTensors

    weight, batch = 4 * 100 * 100, 4 * 10 * 100
    with LiveTensors() as tensors:
        layer = nn.Linear(100, 100, bias=False)
        assert tensors.peak == weight
        layer(torch.ones(10, 100)).sum().backward()
        assert tensors.live == 2 * weight  # with its gradient
    assert 2 * weight + batch <= tensors.peak <= 2 * weight + 3 * batch


@pytest.mark.parametrize("model", ["mlp", "resnet", "transformer"])
def test_ours_and_the_graph_form_convert_the_same_weights(model):
    from measures.subjects import WORKLOADS, Subject, converted_weights

    plain = WORKLOADS[model].make_net()
    trained = sum(parameter.numel() for parameter in plain.parameters())
    expanded = sum(weight.numel() for weight in converted_weights(plain, 3).values())
    ours, graph = Subject(model, "ours", 3), Subject(model, "graph", 3)
    assert sum(phi.numel() for form in ours.engine.forms.values() for phi in form.phi) == 3 * expanded
    assert sum(parameter.numel() for parameter in graph.net.parameters()) == trained + 2 * expanded


@pytest.mark.parametrize("option", ["--pairs=0", "--factors=0", "--models=none"])
def test_impossible_options_are_refused(overhead, option, capsys):
    with pytest.raises(SystemExit) as stop:
        overhead.main([option])
    assert stop.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_bound_that_is_missed_is_said():
    from measures.report import render

    def row(ours):
        step = {"plain": 10.0, "ours": 10 * ours, "graph": 12.0}
        ratios = {"ours": ours, "graph": 1.2}
        return {"model": "resnet", "factor": 4, "step_ms": step, "step_ratio": ratios, "latency_ratio": 1.0}

    facts = {"processor": "x", "cores": 2, "threads": 2, "accelerator": None, "system": "s", "python": "3", "torch": "2"}
    results = {
        "command": "c",
        "environment": facts,
        "settings": {"processes": 3, "models": ["resnet"]},
        "timing": [row(1.01), row(1.04), row(1.05)],
        **{part: [] for part in ("memory", "traffic", "deployed")},
    }
    assert "| resnet | 4 | 10.0 | 1.040 (1.010 to 1.050) | 1.200 (1.200 to 1.200) | 1.03 | FAIL |" in render(results)
    results["timing"][1] = row(1.02)
    assert "| 1.03 | pass |" in render(results)


def test_growth_runs_are_kept_and_not_repeated(growth, tmp_path, monkeypatch):
    monkeypatch.setitem(growth.TASKS, "text", dataclasses.replace(growth.TASKS["text"], batches=1))
    study = growth.Study("text", 8, None, str(tmp_path))
    method = growth.by_name(growth.FUSED)
    donors = study.donors(method, 0, 3e-3)
    run = study.run(method, 0, 3e-3, method.length, donors)
    costs = [growth.train(donor)["flops"] for donor in donors]
    result = growth.train(run)
    assert result["grown_at"] == 0
    assert result["steps"] == 4
    assert result["flops"] > max(costs) > 0
    assert result["curve"][-1][0] == result["flops"]
    assert growth.train(run) == json.loads(json.dumps(result))  # from its file
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_the_growth_table_counts_donors_and_goals(growth):
    study = growth.Study("text", 100, None, "")
    wide, fused = growth.by_name(growth.WIDE), growth.by_name(growth.FUSED)
    planned, results = [], {}
    for seed, reached in ((0, True), (1, False)):
        donors = study.donors(fused, seed, 0.1)
        for method, used, curve in (
            (wide, [], [(50.0, 3.0), (100.0, 2.0)]),
            (fused, donors, [(20.0, 2.5), (40.0, 1.9 if reached else 2.1)]),
        ):
            run = study.run(method, seed, 0.1, method.length, used)
            planned.append((method, seed, used, run))
            results[run.key] = {"curve": curve, "flops": curve[-1][0], "grown_at": None}
        results |= {donor.key: {"flops": 10.0} for donor in donors}
    one, other = growth.summarize(planned, results)
    assert one["share"] == [1.0, 1.0]
    assert other["share"] == [0.4, math.inf]
    assert other["share_with_donors"][0] == pytest.approx(0.6)
    assert other["difference"] == pytest.approx([-0.1, 0.1])
    assert growth.goal(other["share"]) == "1 of 2 (0.40)"
    assert growth.interval([1.0, 1.0]) == "1.000 ± 0.000"
