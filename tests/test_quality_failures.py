"""The study of quality with mistakes in its files, and with data, networks and results that are not what they were."""

import io
import json
import subprocess
from concurrent.futures import Future

import numpy as np
import pytest
import yaml
from rich.console import Console

pytest.importorskip("sklearn")

from benchmarks.quality import __main__ as commands
from benchmarks.quality import plan as planning
from benchmarks.quality.__main__ import commit, main
from benchmarks.quality.build import state_of
from benchmarks.quality.config import StudyError
from benchmarks.quality.execute import _Execution, execute
from benchmarks.quality.place import Place, check_data, digests
from benchmarks.quality.reading import read_study
from benchmarks.quality.store import Store
from benchmarks.quality.table import render, rows
from benchmarks.quality.train import perform
from tests.test_quality import STUDY, TASK, fake, random_state, study, write_study  # noqa: F401

OTHER = {"name": "other", "method": "plain"}
TUNED = {**OTHER, "tuned": "plain"}
LEAN = {"name": "plain", "method": "plain"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trails": 3}, "a study has no trails; there are bases, keys"),
        ({"seeds": 2}, "seeds is 2, no list"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": [0, 0, 1]}, "more than one seed 0"),
        ({"seeds": ["a", "b"]}, "seeds are whole numbers"),
        ({"seeds": [0, 1000]}, "plain was tuned with the seed 1000"),
        ({"trials": "many"}, "trials is 'many', no int"),
        ({"trials": 0}, "plain, majority_kernels need trials"),
        ({"stages": [["plain", "plain"]]}, "more than one row plain"),
        (
            {"stages": [["plain", {**TUNED, "fixed": {"epoch": 1}}]]},
            r"other \(fixed\): plain has no epoch",
        ),
        (
            {"stages": [["plain", {**TUNED, "scale": {"epoch": 2}}]]},
            r"other \(scale\): plain has no epoch",
        ),
        ({"stages": [["plain", {**OTHER, "fixed": {"epoch": 1}}]]}, "other .* no epoch; there are dropout, epochs, lr"),
        (
            {"stages": [["plain", {**OTHER, "against": "plian"}]]},
            r"other is compared \(against\) with plian, none of the rows",
        ),
        ({"stages": [["plain", {**OTHER, "put": {"keep": "lst"}}]]}, "other keeps 'lst'"),
        ({"stages": [["plain", {**OTHER, "tunes": "plain"}]]}, "a row has no tunes"),
        ({"stages": ["plain"]}, "stages are lists of rows, not 'plain'"),
        ({"stages": [["plain", {**OTHER, "put": ["keep"]}]]}, "put of other is"),
        ({"stages": [["plain", {**OTHER, "fixed": 3}]]}, "fixed of other is 3"),
        ({"stages": [["plain", {**TUNED, "scale": {"lr": "big"}}]]}, "scale of other is .* factors are numbers"),
        ({"stages": [["plain", {**OTHER, "tuned": "other"}]]}, "rows need each other.*: tiny_study/other$"),
        ({"stages": [[{**OTHER, "tuned": "plain"}, {**LEAN, "tuned": "other"}]]}, "rows need each other.*: tiny_study/"),
        ({"stages": [["plain", {**TUNED, "steps_of": "other"}]]}, "rows need each other.*: tiny_study/other$"),
        ({"stages": [["plain", None]]}, "a row is a method's name .* None"),
        ({"stages": [["plain", ["ema"]]]}, "a row is a method's name .*ema"),
        ({"stages": [["plain", {**TUNED, "method": "ema"}]]}, "other on tiny: .*decay is no option"),
        (
            {"stages": [["plain", {**OTHER, "put": {"trainer.callbacks.3.every": 1}}]]},
            "other on tiny: trainer.callbacks.3.every",
        ),
        ({"stages": [["plain", {**OTHER, "put": {"model.class_path.a": 1}}]]}, "'lightning_sop.*' on its way has no names"),
        ({"bases": ["tiny_study"]}, "it is a base of itself: tiny_study"),
        ({"refinements": -1}, "refinements is -1"),
    ],
)
def test_mistakes_in_a_study_are_told_with_the_file(tmp_path, changes, message):
    with pytest.raises(StudyError, match=message) as error:
        read_study(str(write_study(tmp_path, **changes)))
    assert "tiny_study" in str(error.value)


def test_what_a_study_lacks_is_told(tmp_path):
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump({name: STUDY[name] for name in ("tasks", "stages")}))
    with pytest.raises(StudyError, match=r"half.yaml: a study needs title, seeds"):
        read_study(str(path))


def test_misspelt_names_of_methods_and_options_are_told():
    from benchmarks.quality import reading

    with pytest.raises(StudyError, match=r"methods.yaml: mine has no callback; there are callbacks"):
        reading._method("mine", {"callback": []})
    with pytest.raises(StudyError, match=r"option decay: it has no defualt"):
        reading._method("mine", {"options": {"decay": {"choice": [1, 2], "defualt": 1}}})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"log": [0.1, 1.0]}, "spaces/tiny.yaml: option lr needs key"),
        ({"kay": "model.init_args.lr", "log": [0.1, 1.0]}, "spaces/tiny.yaml: option lr has no kay"),
        (
            {"key": "modle.init_args.lr", "log": [0.1, 1.0]},
            "option lr needs a default, for the task has no modle.init_args.lr",
        ),
        ({"key": "model.init_args.lr", "log": [0.1]}, "option lr: log is .* a lower and a higher limit, above 0"),
        ({"key": "model.init_args.lr", "log": [0, 0.1]}, "option lr: log is .* above 0"),
        ({"key": "model.init_args.lr", "uniform": [0.2, 0.1]}, "option lr: uniform is .* a lower and a higher limit$"),
        ({"key": "model.init_args.lr", "uniform": [0.1, "much"]}, "option lr: uniform is"),
        ({"key": "model.init_args.lr", "choice": []}, "option lr: choice is"),
        ({"key": "model.init_args.net", "log": [0.1, 1.0]}, "option lr: its default is 'mlp', no number"),
        ({"key": "model.init_args.lr"}, "option lr: it needs a default and one of log"),
    ],
)
def test_mistakes_in_a_space_are_told(tmp_path, option, message):
    path = write_study(tmp_path)
    space = yaml.safe_load((tmp_path / "spaces" / "tiny.yaml").read_text())
    space["options"]["lr"] = option
    (tmp_path / "spaces" / "tiny.yaml").write_text(yaml.safe_dump(space))
    with pytest.raises(StudyError, match=message):
        read_study(str(path))


def test_a_row_that_cannot_be_built_is_told_before_the_others_are_run(tmp_path):
    wrong = {**OTHER, "name": "wrong", "put": {"model.init_args.widht": 3}}
    found = read_study(str(write_study(tmp_path, stages=[[wrong, "plain"]], trials=1, seeds=[0])))
    store, said = Store(tmp_path / "results"), io.StringIO()
    place = Place(None, str(tmp_path / "networks"), "cpu")
    assert execute(found, store, place, jobs=1, console=Console(file=said, width=200)) == 1
    assert "tiny wrong cannot be run: a configuration that LightningCLI refuses" in said.getvalue()
    assert "widht" in said.getvalue()
    assert sorted(result["phase"] for result in store.results.values()) == ["final", "tune"]


def test_a_run_that_was_never_validated_is_no_result(tmp_path):
    row = {"name": "rarely", "method": "plain", "put": {"trainer.check_val_every_n_epoch": 5}}
    found = read_study(str(write_study(tmp_path, stages=[[row]])))
    run = planning.trials(found, found.tasks["tiny"], found.variants["rarely"])[0]
    with pytest.raises(StudyError, match="never validated"):
        perform(run, Place(None, str(tmp_path), "cpu"))


def finish(execution, study, result, row="plain"):  # noqa: F811
    variant = study.variants[row]
    run = planning.trials(study, study.tasks["tiny"], variant)[0]
    execution._finish(planning.Slot("tiny", variant, "teacher", 0, run), {**fake(run, 0.5), **result, "task": "tiny"})
    return run


def line(result):
    """With all that a line of results has."""
    parts = {"phase": "tune", "cost": {"wall_seconds": 1.0}, "environment": {}}
    metrics = {"val_loss": 0.5, "val_acc": 0.5, "epochs": 1}
    return {**parts, "metrics": metrics, **result}


@pytest.mark.parametrize(("result", "given_up"), [({"status": "failed", "reason": "NaN"}, True), ({}, False)])
def test_a_network_that_is_another_one_when_trained_again_is_told(study, tmp_path, result, given_up):  # noqa: F811
    store, said = Store(tmp_path), io.StringIO()
    execution = _Execution(study, store, Place(None, str(tmp_path), "cpu"), 1, None, Console(file=said, width=200))
    run = finish(execution, study, line({}))
    assert "trained again" not in said.getvalue()
    again = {"val_loss": 0.7, "val_acc": 0.5, "epochs": 1}
    finish(execution, study, line({**result, "metrics": again}))
    assert "trained again, and val_loss is" in said.getvalue()
    assert (run.key in execution.errors) == given_up  # else it would be trained for ever
    assert store.results[run.key]["metrics"]["val_loss"] == 0.5


def test_a_score_that_is_no_metric_is_told_after_the_first_run(study, tmp_path):  # noqa: F811
    execution = _Execution(study, Store(tmp_path), Place(None, str(tmp_path), "cpu"), 1, None, Console(file=io.StringIO()))
    with pytest.raises(StudyError, match="task tiny: score is acc, but there is no val_acc"):
        finish(execution, study, line({"metrics": {"val_loss": 0.5, "val_accuracy": 0.5, "epochs": 1}}))


def test_what_was_begun_is_kept_when_a_study_ends_early(study, tmp_path):  # noqa: F811
    execution = _Execution(study, Store(tmp_path), Place(None, str(tmp_path), "cpu"), 1, None, Console(file=io.StringIO()))
    slots = [slot for slot in planning.plan(study, {}) if slot.run][:3]
    metrics = {"val_loss": 0.5, "val_accuracy": 0.5, "epochs": 1}
    for slot in slots[:2]:
        future = Future()
        future.set_result(line({**fake(slot.run, 0.5), "metrics": metrics}))
        execution.running[future] = slot
    failed = Future()
    failed.set_result({"key": slots[2].run.key, "error": "an error"})
    execution.running[failed] = slots[2]
    with pytest.raises(StudyError, match="no val_acc"):
        execution._finish(slots[0], line({**fake(slots[0].run, 0.5), "metrics": metrics}))
    execution._keep_what_runs()
    assert Store(tmp_path).read(["tiny"]).results.keys() == {slot.run.key for slot in slots[:2]}


def test_rows_of_which_all_trials_diverged_are_named(study, tmp_path):  # noqa: F811
    store, said = Store(tmp_path), io.StringIO()
    task = study.tasks["tiny"]
    for row in study.variants.values():
        for run in planning.trials(study, task, row):
            store.results[run.key] = line({**fake(run, 0.1, status="failed")})
    _Execution(study, store, Place(None, str(tmp_path), "cpu"), 1, None, Console(file=said, width=200))._say_what_waits()
    assert "all trials diverged, and no setting can be chosen: tiny plain, tiny majority_kernels" in said.getvalue()


# ---------------------------------------------------------------------- files


def test_results_are_not_made_from_other_data(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()

    def write(seed):
        random = np.random.default_rng(seed)
        np.savez(
            data / "letter.npz", x=random.integers(0, 16, (20000, 16), np.uint8), y=random.integers(0, 26, 20000, np.uint8)
        )

    write(0)
    first = digests(data, "letter.npz")
    assert first == {"letter.npz": digests(data, ".")["letter.npz"]}
    path = write_study(tmp_path, stages=[["plain"]], trials=1, seeds=[0])
    init_args = {**TASK["model"]["init_args"], "image_shape": [16, 1, 1], "num_classes": 26}
    letters = {
        "class_path": "benchmarks.quality.data.Letters",
        "init_args": {"path": "letter.npz", "batch_size": 4096, "val_size": 2000, "seed": 0},
    }
    task = {**TASK, "model": {**TASK["model"], "init_args": init_args}, "data": letters, "trainer": {"max_epochs": 1}}
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    words = ["run", "--study", path, "--data", data, "--jobs", "1", "--accelerator", "cpu"]
    words = [str(word) for word in (*words, "--results", tmp_path / "results", "--networks", tmp_path / "networks")]
    assert main(words) == 0
    lines = [json.loads(text) for text in (tmp_path / "results" / "tiny.jsonl").read_text().splitlines()]
    assert [one["environment"]["data"] for one in lines] == 2 * [first]
    write(1)
    assert main(words) == 2
    assert "letter.npz is not the file that there are results of tiny from" in capsys.readouterr().err
    check_data("tiny", digests(data, "letter.npz"), {"older": {"task": "tiny", "environment": {}}})  # these do not say


def test_a_line_that_is_no_result_is_told(tmp_path, capsys):
    path = write_study(tmp_path)
    (tmp_path / "tiny.jsonl").write_text('{"a": 1}\n')
    for command in ("table", "estimate"):
        assert main([command, "--study", str(path), "--results", str(tmp_path)]) == 2
        assert "tiny.jsonl: line 1 is not the result of a run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["table", "--study", str(path), "--results", str(tmp_path / "file")]) == 2
    with pytest.raises(SystemExit):
        main(["estimate", "--study", str(path), "--jobs", "0"])


def test_folders_that_cannot_be_written_are_told_before_anything_is_trained(tmp_path, capsys):
    path = write_study(tmp_path)
    (tmp_path / "file").write_text("")
    for option, other in (("--results", "--networks"), ("--networks", "--results")):
        words = ["run", "--study", path, option, tmp_path / "file", other, tmp_path / "folder"]
        assert main([str(word) for word in words]) == 2
        said = capsys.readouterr()
        assert f"{option}: nothing can be written into {tmp_path / 'file'}" in said.err
        assert "tiny" not in said.out


def test_a_damaged_network_is_named(study, tmp_path):  # noqa: F811
    run = planning.trials(study, study.tasks["tiny"], study.variants["plain"])[0]
    place = Place(None, str(tmp_path), "cpu")
    place.network(run.key).write_bytes(b"12")
    with pytest.raises(StudyError, match=f"{run.key}.safetensors is damaged .* remove it"):
        state_of(run, place)


def test_a_broken_last_line_is_told_and_a_result_without_a_loss_is_none(study, tmp_path, capsys):  # noqa: F811
    run = planning.trials(study, study.tasks["tiny"], study.variants["plain"])[0]
    good = json.dumps(line(fake(run, 0.5)))
    (tmp_path / "tiny.jsonl").write_text(f"{good}\n{good[:20]}")
    store = Store(tmp_path)
    for _ in range(2):
        assert store.read(["tiny"]).results.keys() == {run.key}
    assert capsys.readouterr().err.count("tiny.jsonl: the last line is broken and is left out") == 1
    (tmp_path / "tiny.jsonl").write_text(json.dumps(line({**fake(run, 0.5), "metrics": {}})))
    with pytest.raises(StudyError, match="line 1 is not the result of a run"):
        store.read(["tiny"])


def test_tasks_that_no_study_has_are_told(capsys):
    assert main(["estimate", "--study", "ablation_*", "--tasks", "nope"]) == 2
    assert "none of the studies ablation_* has the tasks nope" in capsys.readouterr().err


def test_the_first_result_of_a_run_counts(study, tmp_path):  # noqa: F811
    run = planning.trials(study, study.tasks["tiny"], study.variants["plain"])[0]
    lines = [line({**fake(run, loss), "metrics": {"val_loss": loss}}) for loss in (0.1, 0.2)]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    store = Store(tmp_path).read(["tiny"])
    store.add(lines[1])
    assert store.read(["tiny"]).results[run.key]["metrics"]["val_loss"] == 0.1
    assert (tmp_path / "tiny.jsonl").read_text().count("\n") == 2


def test_results_of_another_process_are_seen(study, tmp_path, monkeypatch):  # noqa: F811
    other = Store(tmp_path)
    execution = _Execution(study, Store(tmp_path), Place(None, str(tmp_path), "cpu"), 1, None, Console(file=io.StringIO()))
    for slot in planning.plan(study, {}):
        if slot.run:
            other.add(line(fake(slot.run, 0.5)))
    monkeypatch.setattr(execution, "_open", lambda: [])
    execution._drain(None, None, None)
    assert execution.store.results == other.results


def test_a_line_has_what_its_row_put_into_the_configuration(tmp_path):
    row = {"name": "wide", "method": "plain", "put": {"model.init_args.width": 12}}
    found = read_study(str(write_study(tmp_path, stages=[[row, "plain"]])))
    place = Place(None, str(tmp_path), "cpu")
    task = found.tasks["tiny"]
    wide, plain = (perform(planning.trials(found, task, row)[0], place) for row in found.variants.values())
    assert wide["put"] == row["put"]
    assert "put" not in plain


def test_the_head_of_a_page_is_about_its_own_runs(study):  # noqa: F811
    task = study.tasks["tiny"]
    runs = planning.trials(study, task, study.variants["plain"])
    parts = {"device": "cpu", "threads": 1, "system": "Linux", "torch": "2", "lightning": "2"}
    results = {run.key: line({**fake(run, 0.1), "environment": {**parts, "commit": "own"}}) for run in runs}
    results["other"] = {**results[runs[0].key], "key": "other", "environment": {**parts, "commit": "another"}}
    page = "\n".join(render(study, {"tiny": rows(study, task, results)}, results, "", []))
    assert "code: own." in page


def test_a_commit_is_marked_if_code_differs_and_not_if_results_do(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    files = [tmp_path / "benchmarks" / "quality" / "a.py", tmp_path / "lightning_sop" / "b.py", tmp_path / "results.jsonl"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1\n")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        git(*words)
    monkeypatch.setattr(commands, "HERE", files[0].parent)
    clean = commit()
    files[2].write_text("2\n")
    assert commit() == clean
    assert not clean.endswith("+")
    files[1].write_text("2\n")
    assert commit() == f"{clean}+"


def test_the_command_in_a_page_makes_that_page(tmp_path, capsys):
    path, results = write_study(tmp_path), tmp_path / "results"
    assert main(["table", "--study", str(path), "--results", str(results)]) == 0
    page = (results / "tiny_study.md").read_text()
    assert f"`python -m benchmarks.quality table --study {path} --results {results}`" in page
    assert main(["table", "--study", "/nowhere/*"]) == 2
