"""Further studies: their rows, and data and networks of the larger tasks."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

pytest.importorskip("sklearn")

from benchmarks.quality import plan as planning
from benchmarks.quality.__main__ import main
from benchmarks.quality.build import build
from benchmarks.quality.config import StudyError
from benchmarks.quality.estimate import Estimate
from benchmarks.quality.pictures import CifarImages, shifted
from benchmarks.quality.place import PATHS, Place
from benchmarks.quality.reading import HERE, find_studies, read_study
from benchmarks.quality.sentences import Encoder, Sst2
from benchmarks.quality.table import render, rows
from benchmarks.quality.train import perform
from lightning_sop.zoo import DataError
from tests.test_quality import fake, random_state, study, write_study  # noqa: F401

STUDIES = sorted(path.stem for path in (HERE / "studies").glob("*.yaml"))


def chosen(study):  # noqa: F811
    """Results of trials with which every setting is chosen: the first one of each."""
    results = {}
    for task in study.tasks.values():
        for variant in study.known.values():
            for _ in range(1 + study.refinements):
                for number, run in enumerate(planning.trials(study, task, variant, results)):
                    results[run.key] = fake(run, 0.1 + number)
    return results


def timed(study, task, row, results, ratio):  # noqa: F811
    """A result that says how long steps of a row take."""
    runs = planning.pair(study, task, study.variants[row], results)
    return {planning.timing_key(*runs): {"status": "timed", "cost": {"ratios": [ratio - 0.1, ratio, ratio + 0.2]}}}


@pytest.mark.parametrize("name", STUDIES)
def test_studies_can_be_planned(name):
    found = read_study(name)
    results = {}
    for base in (*found.bases.values(), found):
        for _ in range(3 if base is not found or not found.bases else 1):  # teachers' settings first
            results.update(chosen(base))
    for base in found.bases.values():
        for task in base.tasks.values():
            results.update(timed(base, task, "majority_kernels", results, 1.1))
    slots = planning.plan(found, results)
    assert all(slot.run is not None for slot in slots)
    assert {slot.variant.name for slot in slots if slot.phase == "final"} >= set(found.variants)
    for slot in slots:
        assert yaml.safe_load(yaml.safe_dump(slot.run.config)) == slot.run.config
    estimate = Estimate(found, {})
    assert estimate.total > 0
    assert estimate.table(2).row_count


# networks that rows share are counted once; those of final seeds are rows of their own
@pytest.mark.parametrize(
    ("name", "wanted"), [("core", {"plain": 4 + 5 * 3, "wide": 1}), ("averages", {"plain": 5 * 3 + 5 * 3})]
)
def test_unknown_networks_are_counted_as_often_as_known_ones(name, wanted):
    core = read_study("core").only(["letter"], None)
    counted = read_study(name).only(["letter"], None)
    results = {key: {**result, "cost": {"wall_seconds": 1.0}} for key, result in chosen(core).items()}
    half = {key: result for key, result in results.items() if result["method"] == "plain"}
    for known in ({}, half, results):
        counts = {tuple(row.split(", ")): total[0] for (_, row), total in Estimate(counted, known).rows.items()}
        assert {row[0]: count for row, count in counts.items() if len(row) == 2} == wanted


def test_several_studies_have_a_page_together(tmp_path, capsys):
    names = find_studies("ablation_*")
    assert len(names) == sum(name.startswith("ablation_") for name in STUDIES) > 5
    assert main(["table", "--study", "gpu*", "--results", str(tmp_path)]) == 0
    page = (tmp_path / "gpuall.md").read_text()
    for name in ("gpu", "gpu_finetune"):
        assert f"[{name}]({name}.md)" in page
        assert (tmp_path / f"{name}.md").exists()
    assert "--study 'gpu*'" in page
    assert main(["table", "--study", "nothing_*", "--results", str(tmp_path)]) == 2
    assert "no study nothing_*" in capsys.readouterr().err


def test_ablations_take_the_settings_of_the_core_study():
    core, factor = read_study("core"), read_study("ablation_factor")
    results = chosen(core)
    task = factor.tasks["fashion_mlp"]
    plain = planning.finals(factor, task, factor.variants["plain"], results)
    assert plain == planning.finals(core, task, core.variants["plain"], results)  # the very same runs
    ours = planning.finals(factor, task, factor.variants["k = 4"], results)
    assert ours == planning.finals(core, task, core.variants["majority_kernels"], results)
    other = planning.finals(factor, task, factor.variants["k = 8"], results)[0]
    assert other.setting == ours[0].setting
    assert other.config["trainer"]["callbacks"][0]["init_args"]["method"]["init_args"]["factor"] == 8

    init = read_study("ablation_init")
    run = planning.finals(init, task, init.variants["spread 0.1"], results)[0]
    assert run.config["trainer"]["callbacks"][0]["init_args"]["method"]["init_args"]["spread"] == 0.1
    rates = read_study("ablation_learning_rate")
    assert planning.finals(rates, task, rates.variants["MK x 2"], results)[0].setting["lr"] == 2 * ours[0].setting["lr"]
    with pytest.raises(StudyError, match="no variant core/nothing"):
        core.find("core/nothing")


def test_equal_steps_and_equal_time(study):  # noqa: F811
    plain, ours = study.variants["plain"], study.variants["majority_kernels"]
    longer = replace(plain, name="longer", tuned="plain", time_of="majority_kernels")
    stepped = replace(ours, name="stepped", tuned="majority_kernels", steps_of="plain")
    study = replace(study, trials=1, stages=[[plain, ours, longer, stepped]])
    task, results = study.tasks["tiny"], chosen(study)
    assert planning.finals(study, task, longer, results) is None  # not timed yet
    ours = replace(ours, fixed={"epochs": 3})  # times count for the steps of the other row's epochs
    study = replace(study, stages=[[plain, ours, longer, stepped]])
    results = {**results, **chosen(study)}
    results.update(timed(study, task, "majority_kernels", results, 2.6))
    assert planning.finals(study, task, longer, results)[0].setting["epochs"] == round(3 * 2.6)
    assert planning.finals(study, task, stepped, results)[0].setting["epochs"] == 2


@pytest.mark.parametrize("more", [{"put": {"trainer.max_epochs": 1}}, {"time_of": "apart"}])
def test_equal_time_needs_times_relative_to_one_row(tmp_path, more):
    longer = {"name": "longer", "method": "plain", "tuned": "plain", "time_of": "majority_kernels", **more}
    apart = {"name": "apart", "method": "majority_kernels", "against": "majority_kernels"}
    path = write_study(tmp_path, stages=[["plain", "majority_kernels", apart, longer]])
    with pytest.raises(StudyError, match="tiny_study.yaml: longer has time_of: no put"):
        read_study(str(path))


def test_rows_are_compared_with_their_pair(study):  # noqa: F811
    plain, ours = study.variants["plain"], study.variants["majority_kernels"]
    half = replace(plain, name="plain, half", tuned="plain", scale={"lr": 0.5})
    pair = replace(ours, name="ours, half", tuned="majority_kernels", scale={"lr": 0.5}, against="plain, half")
    study = replace(study, trials=1, stages=[[plain, ours, half, pair]])
    task, results = study.tasks["tiny"], chosen(study)
    cost = {"steps": 10, "seconds": 1.0, "flops": 1e9, "cpu_seconds": 1.0, "parameters": {"training": 2, "deployed": 1}}
    for variant, loss in ((plain, 1.0), (half, 2.0), (pair, 1.75)):
        for seed, run in planning.finals(study, task, variant, results).items():
            result = fake(run, loss, test_loss=loss + 0.01 * seed * (variant is pair))
            result["metrics"]["test_acc"] = 0.5
            place = dict.fromkeys(("device", "threads", "system", "torch", "lightning", "commit"), "")
            results[run.key] = {**result, "cost": cost, "seed": seed, "environment": place}
    trials = [result for result in results.values() if "cost" not in result]
    for result in trials:
        result.update(cost=cost, environment=place)
    page = "\n".join(render(study, {"tiny": rows(study, task, results)}, results, "", []))
    assert "-0.2450 ± 0.0635** to plain, half" in page
    assert "2 of 8 final runs are missing" in page


# ---------------------------------------------------------------------- larger tasks


@pytest.mark.parametrize("task", sorted(path.stem for path in (HERE / "tasks").glob("*.yaml")))
def test_networks_of_all_tasks_can_be_built(task):
    found = read_study("core")
    from benchmarks.quality.reading import read_task

    read = read_task(task, [HERE])
    run = planning.make_run(found, read, found.variants["plain"], "tune", {n: o.default for n, o in read.options.items()}, 0)
    cli = build(run.config, Place(None, "", "cpu"), 0)
    assert isinstance(cli.model, LightningModule)
    assert any(name in run.config["data"]["init_args"] for name in PATHS)
    assert (run.start is None) == (not task.endswith("_finetune"))


def test_images_are_shifted_and_mirrored():
    images = torch.arange(2 * 6 * 5.0).view(1, 2, 6, 5).expand(200, -1, -1, -1) + 1
    moved = shifted(images, 1, torch.Generator().manual_seed(0))
    frame = torch.nn.functional.pad(images[:1], [1] * 4)
    kinds = {}
    for mirrored in (False, True):
        for down in range(3):
            for right in range(3):
                source = torch.nn.functional.pad(images[:1].flip(3), [1] * 4) if mirrored else frame
                kinds[mirrored, down, right] = source[0, :, down : down + 6, right : right + 5]
    found = [[kind for kind, image in kinds.items() if torch.equal(image, one)] for one in moved]
    assert all(len(kind) == 1 for kind in found)
    assert len({kind[0] for kind in found}) == 18
    assert moved.is_contiguous()


def test_some_classes_are_numbered_anew(monkeypatch):
    from lightning_sop.zoo.images import ImageArrays

    labels = torch.arange(10).repeat(6)
    images = labels.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).to(torch.uint8)
    monkeypatch.setattr("lightning_sop.zoo.CifarJpeg.read", lambda self: ImageArrays(images, labels, images, labels))
    data = CifarImages("none", classes=[7, 2], first=5, augment=True, val_size=4)
    data.setup()
    train, val, test = (data._splits[split] for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (5, 4, 12)
    for split in (train, val, test):
        assert torch.equal(split.images[:, 0, 0, 0].long(), torch.tensor([7, 2])[split.labels])
    assert train[0][0].shape == (3, 32, 32)
    with pytest.raises(DataError, match="first=9: there are 8"):
        CifarImages("none", classes=[7, 2], first=9, val_size=4).setup()


def write_sentences(folder, count=40):
    generator = np.random.default_rng(0)
    words = [f"w{number}" for number in range(60)]
    lines = ["sentence\tlabel"]
    for _ in range(count):
        sentence = list(generator.choice(words, 12))
        lines += [f"{' '.join(sentence)} \t{generator.integers(2)}", f"{' '.join(sentence[2:8])} \t0", f"{sentence[0]} \t1"]
    for split, part in (("train", lines), ("dev", lines[:4])):
        (folder / f"sst2_{split}.tsv.gz").write_bytes(gzip.compress("\n".join(part).encode()))


def test_phrases_of_held_out_sentences_are_not_trained_on(tmp_path):
    write_sentences(tmp_path)
    data = Sst2(tmp_path, vocabulary=50, context=10, batch_size=8, val_size=10)
    data.setup()
    train, val, test = (data._splits[split] for split in ("train", "val", "test"))
    assert (len(val), len(test)) == (10, 3)
    assert len(train) == 120 - 3 * 10 + 10  # single words stay
    assert train.tokens.max() == 49
    assert set(train.tokens.shape[1:]) == {10}
    again = Sst2(tmp_path, vocabulary=50, context=10, val_size=10)
    again.setup()
    assert torch.equal(again._splits["val"].tokens, val.tokens)
    few = Sst2(tmp_path, vocabulary=200, context=10, val_size=10, first=20)
    few.setup()
    assert len(few._splits["train"]) == 20
    assert torch.equal(few._splits["val"].labels, val.labels)
    with pytest.raises(DataError, match="first=101: there are 100 sentences"):
        Sst2(tmp_path, val_size=10, first=101).setup()
    with pytest.raises(DataError, match="no readable table"):
        Sst2(tmp_path / "elsewhere").setup()


def test_padding_says_nothing():
    torch.manual_seed(0)
    network = Encoder(20, 8, 2, width=8, depth=1, heads=2, dropout=0.0)
    tokens = torch.randint(2, 20, (3, 5))
    padded = torch.cat([tokens, torch.zeros(3, 3).long()], 1)
    for mode in (True, False):
        network.train(mode)
        with torch.set_grad_enabled(mode):
            assert torch.allclose(network(tokens), network(padded), atol=1e-5)


def test_a_fine_tuned_network_begins_with_its_pre_trained_one(tmp_path):
    path = write_study(tmp_path, trials=1, seeds=[0], stages=[["plain", "majority_kernels"]])
    task = yaml.safe_load((tmp_path / "tasks" / "tiny.yaml").read_text())
    (tmp_path / "tasks" / "first.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "spaces" / "first.yaml").write_text((tmp_path / "spaces" / "tiny.yaml").read_text())
    task["model"]["init_args"]["lr"] = 0.0  # nothing moves
    (tmp_path / "tasks" / "tiny.yaml").write_text(yaml.safe_dump({"start": "first", **task}))
    found = read_study(str(path))
    assert found.files == ["tiny", "first"]
    place, results = Place(None, str(tmp_path / "networks"), "cpu"), {}
    slots = planning.plan(found, {})
    assert [(slot.task, slot.phase) for slot in slots[:2]] == [("first", "teacher"), ("tiny", "tune")]
    for slot in planning.plan(found, {})[:2]:
        results[slot.run.key] = perform(slot.run, place, {need.key: results[need.key] for need in slot.run.needs})
    first, then = (results[slot.run.key] for slot in slots[:2])
    assert then["start"] == first["key"]
    assert "teachers" not in then["cost"]
    from safetensors.torch import load_file

    from benchmarks.quality.derive import begin

    cli = build(slots[1].run.config, place, slots[1].run.seed)
    begin(slots[1].run, place, cli)
    trained = load_file(place.network(first["key"]))
    assert torch.equal(cli.model.state_dict()["net.hidden.0.weight"], trained["net.hidden.0.weight"])
    assert not torch.equal(cli.model.state_dict()["net.head.weight"], trained["net.head.weight"])
    assert Path(place.network(first["key"])).exists()
