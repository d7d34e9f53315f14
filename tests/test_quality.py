"""The study of quality: it survives being killed, chooses by validation alone, and counts seeds in pairs."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("sklearn")

from scipy import stats as scipy_stats

from benchmarks.quality import plan as planning
from benchmarks.quality.config import Variant, settings
from benchmarks.quality.place import Place
from benchmarks.quality.reading import read_study
from benchmarks.quality.stats import interval, paired
from benchmarks.quality.store import Store
from benchmarks.quality.table import render, rows

ROOT = Path(__file__).parents[1]
TASK = {
    "model": {
        "class_path": "lightning_sop.zoo.ImageClassifier",
        "init_args": {"net": "mlp", "width": 8, "depth": 1, "lr": 0.01, "weight_decay": 0.01},
    },
    "data": {"class_path": "lightning_sop.zoo.Digits", "init_args": {"batch_size": 256, "seed": 0}},
    "trainer": {"max_epochs": 2},
}
SPACE = {
    "title": "digits",
    "score": "acc",
    "options": {
        "lr": {"key": "model.init_args.lr", "log": [0.001, 0.1]},
        "dropout": {"key": "model.init_args.dropout", "choice": [0.0, 0.5]},
        "epochs": {"key": "trainer.max_epochs", "choice": [2, 3]},
    },
}
STUDY = {
    "title": "Tiny",
    "tasks": ["tiny"],
    "stages": [["plain", "majority_kernels"]],
    "trials": 2,
    "tuning_seed": 1000,
    "seeds": [0, 1],
}


@pytest.fixture(autouse=True)
def random_state():
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


def write_study(folder, **changes):
    for name, content in (("tasks", TASK), ("spaces", SPACE)):
        (folder / name).mkdir()
        (folder / name / "tiny.yaml").write_text(yaml.safe_dump(content))
    (folder / "tiny_study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    return folder / "tiny_study.yaml"


@pytest.fixture
def study(tmp_path):
    return read_study(str(write_study(tmp_path)))


def start(path, results):
    words = ["-m", "benchmarks.quality", "run", "--study", path, "--jobs", "1", "--accelerator", "cpu", "--results", results]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, words), "--networks", str(results / "networks")]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that was killed in the middle, and started again."""
    folder = tmp_path_factory.mktemp("study")
    path, results = write_study(folder), folder / "results"
    lines = results / "tiny.jsonl"
    runner = start(path, results)
    while not lines.exists() or lines.read_bytes().count(b"\n") < 3:
        assert runner.poll() is None, runner.stderr.read()
        time.sleep(0.02)
    workers = children(runner.pid)
    runner.send_signal(signal.SIGKILL)
    runner.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    before = lines.read_bytes()
    lines.write_bytes(before + b'{"key": "half a li')
    runner = start(path, results)
    _, said = runner.communicate(timeout=100)
    return {
        "study": read_study(str(path)),
        "before": before,
        "lines": lines,
        "said": said,
        "alive": alive,
        "status": runner.returncode,
    }


def test_a_killed_study_goes_on_without_losing_or_repeating_a_run(finished):
    content = finished["lines"].read_bytes()
    results = [json.loads(line) for line in content.splitlines()]

    assert finished["status"] == 0, finished["said"]
    assert not finished["alive"]  # workers end with the process that started them
    assert 3 <= finished["before"].count(b"\n") < 8
    assert content.startswith(finished["before"])
    assert len(results) == 8 == len({result["key"] for result in results})
    assert "the last line is broken" in finished["said"]
    slots = planning.plan(finished["study"], Store(finished["lines"].parent).read(["tiny"]).results)
    assert {slot.run.key for slot in slots} == {result["key"] for result in results}


def test_a_line_says_what_was_run_what_came_out_and_what_it_cost(finished):
    results = [json.loads(line) for line in finished["lines"].read_text().splitlines()]
    for result in results:
        assert ("test_loss" in result["metrics"]) == (result["phase"] == "final")
        assert result["metrics"]["val_loss"] == pytest.approx(min(result["metrics"]["curve"]["val_loss"]), rel=1e-4)
        assert result["cost"]["steps"] == 5 * result["setting"]["epochs"] == 5 * result["metrics"]["epochs"]
        assert result["cost"]["flops"] > 0 < result["cost"]["seconds"]
        assert result["environment"]["threads"] == 1
        assert result["seed"] == (1000 if result["phase"] == "tune" else result["seed"] % 1000)
    plain, ours = (next(r for r in results if r["method"] == name)["cost"]["parameters"] for name in planning_names())
    assert plain["training"] == plain["deployed"] == ours["deployed"] == 64 * 8 + 8 + 8 * 10 + 10
    assert ours["training"] == ours["deployed"] + 3 * (64 * 8 + 8 * 10)  # four kernels by default
    for result in results:
        there = (finished["lines"].parent / "networks" / f"{result['key']}.safetensors").exists()
        assert there == (result["phase"] == "final")


def planning_names():
    return ("plain", "majority_kernels")


def test_the_table_has_paired_differences_and_the_same_number_of_trials(finished):
    study = finished["study"]
    results = Store(finished["lines"].parent).read(["tiny"]).results
    found = rows(study, study.tasks["tiny"], results)
    page = "\n".join(render(study, {"tiny": found}, results, "the command", []))

    assert {row.tried for row in found.values()} == {row.wanted for row in found.values()} == {2}
    differences = [found["majority_kernels"].metric("test_loss")[s] - found["plain"].metric("test_loss")[s] for s in (0, 1)]
    low, high = scipy_stats.t.interval(0.95, 1, sum(differences) / 2, scipy_stats.sem(differences))
    assert f"{sum(differences) / 2:+.4f} ± {(high - low) / 2:.4f}" in page
    assert "the command" in page
    assert "so far" not in page

    missing = {key: result for key, result in results.items() if not (result["seed"] == 1 and result["method"] == "plain")}
    partial = "\n".join(render(study, {"tiny": rows(study, study.tasks["tiny"], missing)}, missing, "", []))
    assert "1 of 2 seeds so far" in partial
    assert f"{differences[0]:+.4f} (1 seeds)" in partial


def test_intervals_are_those_of_student():
    values, others = {0: 1.0, 1: 2.5, 2: 3.0, 5: 9.0}, {0: 0.5, 1: 1.0, 2: 2.75, 7: 1.0}
    expected = scipy_stats.ttest_rel([1.0, 2.5, 3.0], [0.5, 1.0, 2.75]).confidence_interval(0.95)
    found = paired(values, others)
    assert found.count == 3
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(expected))
    assert math.isnan(interval([2.0]).half)
    assert not interval([2.0]).excludes_zero
    assert interval([]) is None


def fake(run, val_loss, test_loss=None, status="done"):
    metrics = {"val_loss": val_loss, "epochs": 1, **({} if test_loss is None else {"test_loss": test_loss})}
    return {"key": run.key, "task": run.task, "method": run.method, "status": status, "metrics": metrics, "reason": None}


def test_settings_are_chosen_by_validation_and_diverged_trials_are_not(study):
    study = replace(study, trials=4)
    task, plain = study.tasks["tiny"], study.variants["plain"]
    runs = planning.trials(study, task, plain)
    results = {
        runs[0].key: fake(runs[0], 0.5, test_loss=0.1),  # no such number is there; it would not be read
        runs[1].key: fake(runs[1], 0.4, test_loss=9.0),
        runs[2].key: fake(runs[2], 0.1, status="failed"),
    }
    assert planning.choice(study, task, plain, results) is None  # a trial is missing
    assert planning.finals(study, task, plain, results) is None
    results[runs[3].key] = fake(runs[3], 0.6, test_loss=0.0)
    assert planning.choice(study, task, plain, results) == runs[1]
    last = planning.finals(study, task, plain, results)
    assert [run.setting for run in last.values()] == [runs[1].setting] * 2
    assert [run.config["data"]["init_args"]["seed"] for run in last.values()] == [0, 1]

    diverged = {run.key: fake(run, 0.1, status="failed") for run in runs}
    assert not [slot for slot in planning.plan(study, diverged) if slot.variant == plain and slot.phase == "final"]


def test_the_best_rate_is_bracketed(study):
    study = replace(study, trials=2, refinements=3)
    task, plain = study.tasks["tiny"], study.variants["plain"]
    loss = {}  # by rate; the best one is near 0.013

    def go_on():
        runs = planning.trials(study, task, plain, results)
        for run in runs:
            rate = run.setting["lr"]
            assert loss.setdefault(rate, abs(math.log(rate / 0.013))) == abs(math.log(rate / 0.013))
            results[run.key] = fake(run, loss[rate], status="failed" if rate > 0.015 else "done")
        return [run.setting["lr"] for run in runs]

    results = {}
    go_on()
    # all that is known of the others is how many they are
    slots = [slot for slot in planning.plan(study, {}) if slot.variant == plain and slot.phase == "tune"]
    assert [slot.run is None for slot in slots] == [False] * 2 + [True] * 6
    first = go_on()
    assert first[0] == 0.01  # the default; the drawn one is worse
    assert first[2:] == [0.005, 0.02]
    assert planning.choice(study, task, plain, results) is None
    assert go_on()[4:] == [0.007071, 0.01414]  # 0.02 diverged
    rates = go_on()
    assert rates[6:] == [0.01189, 0.01682]  # half-way to 0.01 and to 0.02
    others = [{**run.setting, "lr": 0} for run in planning.trials(study, task, plain, results)]
    assert all(other == others[0] for other in others[2:])
    assert planning.choice(study, task, plain, results).setting["lr"] == min(loss, key=loss.get)
    fixed = replace(plain, fixed={"lr": 0.003})  # nothing to bracket
    assert {run.setting["lr"] for run in planning.trials(study, task, fixed, {})} == {0.003}


def test_methods_try_the_same_settings_beginning_with_the_default(study):
    study = replace(study, trials=11)
    task = study.tasks["tiny"]
    plain, ours = (settings(study, task, Variant(name, name)) for name in ("plain", "majority_kernels_tuned"))

    assert len(plain) == len(ours) == 11
    assert plain[0] == {"lr": 0.01, "dropout": 0.0, "epochs": 2}
    assert ours[0] == {**plain[0], "factor": 4, "draw": "uniform", "granularity": "layer"}
    for one, other in zip(plain[1:], ours[1:], strict=True):
        assert one == {name: other[name] for name in one}
    assert settings(replace(study, trials=3), task, study.variants["plain"]) == plain[:3]
    shares = sorted(int(8 * math.log(setting["lr"] / 0.001) / math.log(100)) for setting in plain[1:8])
    assert len(set(shares)) == 7  # each in an eighth of the range of its own


def run_of(study, name, seed=0, **setting):
    task, variant = study.tasks["tiny"], study.variants[name]
    first = settings(study, task, variant)[0]
    return planning.make_run(study, task, variant, "tune", {**first, **setting}, seed)


def test_methods_share_initialization_and_order(study, tmp_path):
    from benchmarks.quality.train import build, fit

    seen = {}
    for name, setting in (("plain", {}), ("majority_kernels", {"dropout": 0.5, "epochs": 3})):
        run = run_of(study, name, **setting)
        cli = build(run.config, Place(None, str(tmp_path), "cpu"), run.seed)
        first = {key: value.clone() for key, value in cli.model.state_dict().items() if value.is_floating_point()}
        labels, step = [], cli.model.training_step
        cli.model.training_step = lambda batch, index, step=step, labels=labels: (
            labels.append(batch[1]),
            step(batch, index),
        )[1]
        fit(cli.trainer, cli.model, cli.datamodule, run.seed)
        seen[name] = first, torch.cat(labels)
    for key, value in seen["plain"][0].items():
        assert torch.equal(value, seen["majority_kernels"][0][key])
    length = len(seen["plain"][1])
    assert torch.equal(seen["plain"][1], seen["majority_kernels"][1][:length])


def test_a_run_that_diverges_is_a_result(study, tmp_path):
    from benchmarks.quality.train import perform

    for name in planning_names():
        result = perform(run_of(study, name, lr=1e30), Place(None, str(tmp_path), "cpu"))
        assert result["status"] == "failed"
        assert "val_loss is" in result["reason"]
        json.dumps(result, allow_nan=False)


def test_the_kept_weights_are_those_that_were_validated(study, tmp_path):
    from benchmarks.quality.train import Best, build, fit

    task = study.tasks["tiny"]
    ema = replace(study.variants["plain"], name="ema", method="ema")
    setting = {**settings(study, task, ema)[0], "decay": 0.9}
    run = planning.make_run(study, task, ema, "tune", setting, 0)
    cli = build(run.config, Place(None, str(tmp_path), "cpu"), 0)
    best = Best()
    cli.trainer.callbacks.insert(0, best)
    fit(cli.trainer, cli.model, cli.datamodule, 0)
    average = best.state
    plain = build({**run.config, "trainer": {}}, Place(None, str(tmp_path), "cpu"), 0)
    plain.model.load_state_dict(average)
    found = plain.trainer.validate(plain.model, plain.datamodule, verbose=False)[0]
    assert found["val_loss"] == pytest.approx(best.metrics["val_loss"], rel=1e-5)


def test_the_last_epoch_is_kept_where_a_row_says_so(study, tmp_path):
    from types import SimpleNamespace

    from benchmarks.quality.train import Best, perform

    task, module = study.tasks["tiny"], torch.nn.Linear(1, 1)
    for last, kept in ((False, 2), (True, 3)):
        best = Best(last)
        for epoch, loss in enumerate((0.5, 0.3, 0.4), start=1):
            torch.nn.init.constant_(module.weight, epoch)
            seen = SimpleNamespace(callback_metrics={"val_loss": torch.tensor(loss)})
            best.on_validation_epoch_end(seen, module)
            best.on_validation_end(seen, module)
        assert (best.epoch, float(best.state["weight"])) == (kept, kept)
    row = replace(study.variants["plain"], put={"keep": "last"})
    run = planning.make_run(study, task, row, "final", {**settings(study, task, row)[0], "lr": 0.5, "epochs": 3}, 0)
    assert run.key != planning.make_run(study, task, study.variants["plain"], "final", run.setting, 0).key
    metrics = perform(run, Place(None, str(tmp_path), "cpu"))["metrics"]
    assert metrics["best_epoch"] == metrics["epochs"] == 3
    assert metrics["val_loss"] == metrics["last"]["val_loss"]
    page = "\n".join(render(replace(study, stages=[[row]]), {}, {}, "", []))
    assert "keeps its last epoch" in page


def test_the_core_study_can_be_planned():
    study = read_study("core")
    slots = planning.plan(study, {})
    counts = {}
    for slot in slots:
        counts.setdefault((slot.task, slot.variant.name, slot.phase), []).append(slot.index)
    assert {len(indices) for (*_, phase), indices in counts.items() if phase == "tune"} == {study.all_trials}
    assert {len(indices) for (*_, phase), indices in counts.items() if phase == "final"} == {5}
    assert not {slot.run.seed for slot in slots if slot.run} & set(study.seeds)
