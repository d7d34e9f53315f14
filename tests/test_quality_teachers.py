"""Whole runs of methods that need other networks: which ones, what is made of them, and that their cost is counted."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

pytest.importorskip("sklearn")

from benchmarks.quality import plan as planning
from benchmarks.quality.build import network_of
from benchmarks.quality.config import settings
from benchmarks.quality.costs import spent
from benchmarks.quality.place import Place
from benchmarks.quality.reading import read_study
from benchmarks.quality.table import render, rows, write
from benchmarks.quality.timing import measure, missing, restore
from benchmarks.quality.train import perform
from tests.test_quality import random_state, study, write_study  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")
#: Runs that are finished; what changes their keys would throw their results away.
FINISHED = {
    ("letter", "plain", 0): "75fcf6ebc7a3cce8",
    ("letter", "majority_kernels", 1): "e09fbf67c6090f3e",
    ("letter", "spread_0.3", 0): "43a8cfdc535e3f71",
    ("letter", "independent", 0): "7c8aaf22eaa44ea7",
    ("letter", "ema", 4): "30ddf0c99387cb32",
    ("fashion_mlp", "plain", 0): "e20aa7438b89c12c",
    ("fashion_resnet", "plain", 0): "49b70e6e9fa542cd",
    ("shakespeare", "plain", 0): "25de922a6d84e858",
}


def test_finished_runs_keep_their_keys():
    core, variants = read_study("core"), read_study("variants")
    for (task, name, trial), key in FINISHED.items():
        found = core if name in core.variants else variants
        assert planning.trials(found, found.tasks[task], found.variants[name])[trial].key == key
    final = planning.make_run(core, core.tasks["letter"], core.variants["plain"], "final", {"lr": 0.001, "epochs": 40}, 3)
    assert final.key == "d763fd517d54b62c"


DERIVED = ["k_average", "k_average_one_init", "k_ensemble", "distilled", "wide", "wide_reduced"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole study in this process, each run as soon as what it needs is there."""
    folder = tmp_path_factory.mktemp("derived")
    path = write_study(folder, stages=[["plain", "majority_kernels"], DERIVED], trials=1)
    whole = read_study(str(path))
    assert whole.methods["distilled"].teachers.count == 4
    two = {
        name: replace(method, teachers=replace(method.teachers, count=2)) if name in DERIVED[:4] else method
        for name, method in whole.methods.items()
    }
    whole = replace(whole, methods=two)  # two teachers are faster
    place = Place(None, str(folder / "networks"), "cpu")
    results, order = {}, []
    while todo := [slot for slot in planning.plan(whole, results) if slot.run and slot.run.key not in results]:
        run = todo[0].run
        results[run.key] = json.loads(json.dumps(perform(run, place, {need.key: results[need.key] for need in run.needs})))
        order.append(run)
    return whole, results, place, order


def finals(done, name, seed=0):
    whole, results, *_ = done
    run = planning.finals(whole, whole.tasks["tiny"], whole.variants[name], results)[seed]
    return run, results[run.key]


def test_teachers_are_other_networks_on_the_same_split(done):
    whole, results, *_ = done
    run, _ = finals(done, "distilled", 1)
    assert run.teachers[0] == finals(done, "plain", 1)[0]
    assert len({teacher.key for teacher in run.teachers}) == 2
    assert {teacher.config["data"]["init_args"]["seed"] for teacher in run.teachers} == {1} == {run.split}
    assert not {teacher.seed for teacher in run.teachers[1:]} & {0, 1, 1000}
    assert not any("test_loss" in results[teacher.key]["metrics"] for teacher in run.teachers[1:])
    one_init = finals(done, "k_average_one_init", 1)[0].teachers
    assert [(teacher.seed, teacher.order is None) for teacher in one_init] == [(1, True), (1, False)]
    # as an earlier row's key does not know of them, a derived run's does
    other = planning.make_run(whole, whole.tasks["tiny"], whole.variants["distilled"], "final", run.setting, 1)
    assert other.key != run.key


def test_derived_networks_are_what_their_teachers_say(done):
    place = done[2]
    for name in ("k_average", "k_average_one_init"):
        run, _ = finals(done, name)
        networks = [network_of(teacher, place) for teacher in run.teachers]
        average = network_of(run, place)
        stacked = torch.stack([network.net.hidden[0].weight for network in networks])
        assert torch.allclose(average.net.hidden[0].weight, stacked.mean(0), atol=1e-6)
    run, result = finals(done, "k_ensemble")
    networks = [network_of(teacher, place) for teacher in run.teachers]
    from benchmarks.quality.build import bare

    data = bare(run, place).datamodule
    data.setup("test")
    images, labels = next(iter(DataLoader(data._splits["test"], 10_000, collate_fn=lambda batch: batch)))
    with torch.no_grad():
        mean = torch.stack([network(images).softmax(1) for network in networks]).mean(0)
    assert result["metrics"]["test_loss"] == pytest.approx(float(F.nll_loss(mean.log(), labels)), rel=1e-4)
    assert result["metrics"]["test_acc"] == pytest.approx(float((mean.argmax(1) == labels).float().mean()), abs=1e-6)
    assert result["cost"]["parameters"]["deployed"] == 2 * finals(done, "plain")[1]["cost"]["parameters"]["deployed"]


def test_the_cost_of_teachers_is_counted(done):
    _, results, *_ = done
    plain = finals(done, "plain")[1]["cost"]
    for name in ("distilled", "k_average", "k_average_one_init", "k_ensemble"):
        run, result = finals(done, name)
        for what in ("steps", "flops", "seconds", "cpu_seconds"):
            teachers = sum(results[teacher.key]["cost"][what] for teacher in run.teachers)
            assert result["cost"]["teachers"][what] == pytest.approx(teachers)
            assert spent(result, what) == pytest.approx(teachers + result["cost"][what])
        assert spent(result, "flops") >= 2 * plain["flops"]
        assert name == "distilled" or result["cost"]["flops"] == 0  # evaluation is no training
    # each step of the student has forwards of two teachers: 3 + 2 in place of 3
    distilled = finals(done, "distilled")[1]["cost"]
    assert distilled["flops"] / distilled["steps"] == pytest.approx(5 / 3 * plain["flops"] / plain["steps"], rel=0.35)
    run, result = finals(done, "wide_reduced")
    assert spent(result, "steps") == result["cost"]["steps"] + finals(done, "wide")[1]["cost"]["steps"]
    assert spent(result, "flops") > finals(done, "wide")[1]["cost"]["flops"]
    assert result["cost"]["parameters"]["deployed"] == plain["parameters"]["deployed"]
    assert run.epochs == 1  # a quarter of two, at least one


def test_steps_are_timed_in_turns_with_those_of_the_plain_network(done, tmp_path):
    whole, results, place, _ = done
    pairs, waiting = missing(whole, results, place)
    assert not waiting
    assert {run.method for run, _ in pairs} == {"majority_kernels", "distilled", "wide", "wide_reduced"}
    assert {other.method for _, other in pairs} == {"plain"}
    run, other = next(one for one in pairs if one[0].method == "distilled")
    line = json.loads(json.dumps(measure(run, other, place, rounds=3)))
    assert len(line["cost"]["ratios"]) == 3
    assert min(line["cost"]["ratios"]) > 0 < line["cost"]["step_seconds"]
    assert line["key"] not in results
    timed = {**results, line["key"]: line}
    assert len(missing(whole, timed, place)[0]) == len(pairs) - 1
    found = rows(whole, whole.tasks["tiny"], timed)
    low, middle, high = sorted(line["cost"]["ratios"])
    assert f"| {middle:.2f} ({low:.2f}-{high:.2f}) |" in "\n".join(render(whole, {"tiny": found}, timed, "", []))
    empty = Place(None, str(tmp_path), "cpu")  # what is lost is trained again, as it was
    assert missing(whole, results, empty) == (pairs, [])
    restore(run, results, empty)
    for need in run.needs:
        assert empty.network(need.key).read_bytes() == place.network(need.key).read_bytes()
    never = {key: result for key, result in results.items() if key not in {need.key for need in run.needs[1:]}}
    assert missing(whole, never, empty)[1] == ["tiny distilled"]


def test_the_table_names_the_whole_cost(done, tmp_path):
    whole, results, *_ = done
    assert "![" in write(whole, results, tmp_path, "").read_text()
    for name in ("differences", "costs", "curves"):
        assert (tmp_path / f"{whole.name}_{name}.png").stat().st_size > 10_000
    found = rows(whole, whole.tasks["tiny"], results)
    page = "\n".join(render(whole, {"tiny": found}, results, "", []))
    assert "Majority Kernels minus distilled" in page
    assert found["k_average"].cost("steps") == 2 * found["plain"].cost("steps")
    assert "so far" not in page
    assert found["k_ensemble"].tried == found["plain"].tried


def test_a_lost_network_is_trained_again(done, tmp_path):
    from benchmarks.quality.execute import _Execution
    from benchmarks.quality.store import Store

    whole, results, place, _ = done
    store = Store(tmp_path)
    run, _ = finals(done, "distilled", 1)
    store.results = {key: result for key, result in results.items() if key != run.key}
    execution = _Execution(whole, store, place, 1, None, None)
    assert [slot.run.key for slot in execution._open()] == [run.key]
    path = place.network(run.teachers[0].key)
    content = path.read_bytes()
    path.unlink()
    (slot,) = execution._open()
    assert (slot.run.key, slot.run.phase) == (run.teachers[0].key, "teacher")
    again = perform(slot.run, place)
    assert "test_loss" not in again["metrics"]
    assert path.read_bytes() == content
    store.add(results[run.teachers[0].key])
    store.add({**again, "task": "tiny"})
    assert store.results[again["key"]] == results[again["key"]]


def test_a_run_without_its_teachers_is_a_failed_one(done, tmp_path):
    _, results, place, _ = done
    run, _ = finals(done, "distilled")
    given = {teacher.key: results[teacher.key] for teacher in run.teachers}
    given[run.teachers[1].key] = {**given[run.teachers[1].key], "status": "failed"}
    result = perform(run, place, given)
    assert result["status"] == "failed"
    assert run.teachers[1].key in result["reason"]
    assert spent(result, "steps") > 0


@pytest.mark.parametrize("name", ["swa", "overcomplete", "gradient_noise", "gradient_penalty"])
def test_other_methods_run_and_keep_a_plain_network(study, name, tmp_path):  # noqa: F811
    variant = replace(study.variants["plain"], name=name, method=name)
    task = study.tasks["tiny"]
    setting = settings(study, task, variant)[0]
    place = Place(None, str(tmp_path), "cpu")
    run = planning.make_run(study, task, variant, "final", setting, 0)
    result = perform(run, place)
    assert result["status"] == "done"
    module = network_of(run, place)
    assert list(module.state_dict()) == ["net.hidden.0.weight", "net.hidden.0.bias", "net.head.weight", "net.head.bias"]
    trained, deployed = (result["cost"]["parameters"][key] for key in ("training", "deployed"))
    assert trained > 1.5 * deployed if name == "overcomplete" else trained == deployed


def test_outlying_rows_do_not_hide_the_others():
    from benchmarks.quality.plots import _limit

    assert 0.02 < _limit([0.008, 0.002, 0.004, 3.09, 0.016]) < 3
    assert _limit([0.0]) == 0
    assert _limit([]) > 1e9
