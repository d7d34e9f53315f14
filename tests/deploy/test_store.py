from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from deploy_toys import CompiledInside, Tied, Toy
from safetensors import safe_open

from lightning_sop import reparam
from lightning_sop.deploy import (
    CollapseError,
    DeployContent,
    DeployFileError,
    collapse_file,
    load_into,
    read,
    verify,
    write,
)
from lightning_sop.deploy.content import from_checkpoint
from lightning_sop.deploy.receipt import Proof, make_receipt
from lightning_sop.deploy.tolerance import Tolerance

FORMATS = ["ckpt", "safetensors"]


def checkpoint(model, **entries):
    own = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "global_step": 3, "epoch": 1}
    return {**own, "pytorch-lightning_version": "2.6.6", "optimizer_states": [], "callbacks": {}, **entries}


def content_of(model, **entries) -> DeployContent:
    content = from_checkpoint(checkpoint(model, **entries))
    about = {"source": "plain", "training_file": "x.ckpt", "step": 3, "epoch": 1, "tolerance": Tolerance(1e-4)}
    receipt = make_receipt(content, Proof(), **about)
    return replace(content, receipt=receipt)


def same(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_is_read(tmp_path, format):
    model = Toy(width=5)
    content = content_of(model)
    write(tmp_path / f"x.{format}", content)
    again = read(tmp_path / f"x.{format}")
    assert dict(sorted(again.state_dict.items())).keys() == dict(sorted(model.state_dict().items())).keys()
    assert all(torch.equal(again.state_dict[name], value) for name, value in model.state_dict().items())
    assert again.hyper_parameters == {"width": 5}
    assert again.receipt == content.receipt == verify(tmp_path / f"x.{format}")
    assert again.receipt["values"] == sum(t.numel() for t in model.state_dict().values())
    assert again.receipt["bytes"] == sum(t.nbytes for t in model.state_dict().values())


def test_ckpt_is_plain_data_in_lightnings_layout(tmp_path):
    write(tmp_path / "x.ckpt", content_of(Toy()))
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(loaded) == {"state_dict", "hyper_parameters", "pytorch-lightning_version", "lightning_sop_receipt"}
    assert same(Toy.load_from_checkpoint(tmp_path / "x.ckpt").state_dict(), loaded["state_dict"])


def test_safetensors_has_every_name_and_json_metadata(tmp_path):
    model = Tied()
    write(tmp_path / "x.safetensors", content_of(model))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert json.loads(file.metadata()["lightning_sop_receipt"])["format_version"] == 1
        assert json.loads(file.metadata()["hyper_parameters"]) == {}


def test_safetensors_refuses_entries_that_are_no_tensors(tmp_path):
    content = content_of(Toy())
    content.state_dict["extra"] = 1
    with pytest.raises(CollapseError, match=r"'extra'.*format='ckpt'"):
        write(tmp_path / "x.safetensors", content)


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.ones(3, dtype=torch.complex128)], ids=["sparse", "complex"]
)
def test_safetensors_refuses_tensors_that_it_cannot_hold_by_name(tmp_path, tensor):
    content = content_of(Toy())
    content.state_dict["graph"] = tensor
    kind = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "").replace(", ", ".*")
    with pytest.raises(CollapseError, match=rf"'graph', a tensor of {kind}.*format='ckpt'"):
        write(tmp_path / "x.safetensors", content)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_changed_after_writing_are_noticed(tmp_path, format):
    content = content_of(Toy())
    path = tmp_path / f"x.{format}"
    write(path, content)
    content.state_dict["head.bias"] += 1
    with pytest.raises(DeployFileError, match=r"x\.\w+ was changed|tmp was changed"):
        write(path, content)
    verify(path)  # the file that was there


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_truncated_file(tmp_path, format, share):
    path = tmp_path / f"x.{format}"
    write(path, content_of(Toy()))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DeployFileError, match=rf"x\.{format} .*(corrupt|truncated).*write it anew"):
        read(path)


def test_files_of_another_kind(tmp_path):
    torch.save(checkpoint(Toy()), tmp_path / "training.ckpt")
    with pytest.raises(DeployFileError, match=r"training.ckpt is no deploy file.*lightning-sop collapse"):
        read(tmp_path / "training.ckpt")
    (tmp_path / "text.ckpt").write_text("hello, this is some text and no tensors")
    with pytest.raises(DeployFileError, match=r"text.ckpt is neither"):
        read(tmp_path / "text.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(DeployFileError, match=r"list.ckpt holds a list"):
        read(tmp_path / "list.ckpt")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.ckpt")


def test_a_later_format_version_asks_for_an_update(tmp_path):
    content = content_of(Toy())
    content.receipt["format_version"] = 99
    torch.save(content.as_checkpoint(), tmp_path / "x.ckpt")
    with pytest.raises(DeployFileError, match=r"format version 99.*update"):
        read(tmp_path / "x.ckpt")


@pytest.mark.parametrize("format", FORMATS)
def test_load_into_a_model_compiled_in_parts(tmp_path, format):
    source, target = Tied(), Tied()
    target.net = torch.compile(target.net)
    write(tmp_path / f"x.{format}", content_of(source))
    assert load_into(target, tmp_path / f"x.{format}")["source"] == "plain"
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_load_into_another_model_is_an_error(tmp_path):
    write(tmp_path / "x.ckpt", content_of(Toy()))
    with pytest.raises(RuntimeError, match=r"again.weight"):
        load_into(Tied(), tmp_path / "x.ckpt")


# ---------------------------------------------------------------------- after the fact


def test_collapse_file(tmp_path):
    model = Toy()
    torch.save(checkpoint(model), tmp_path / "run.ckpt")
    receipt = collapse_file(tmp_path / "run.ckpt", tmp_path / "small.safetensors", dtype="bfloat16")
    assert receipt == verify(tmp_path / "small.safetensors")
    assert (receipt["source"], receipt["dtype"], receipt["global_step"]) == ("plain", "bfloat16", 3)
    assert receipt["output_difference"] is None
    assert receipt["training_file"] == "run.ckpt"
    expected = {k: v.bfloat16() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    assert all(torch.equal(read(tmp_path / "small.safetensors").state_dict[k], v) for k, v in expected.items())


def test_collapse_file_compares_with_the_methods_own_tensors(tmp_path, monkeypatch):
    model = Toy()
    monkeypatch.setattr(reparam, "collapsed_from_state", lambda state: state["forms"])
    right = {"head.weight": model.head.weight.detach().double()}
    torch.save(checkpoint(model, callbacks={"Sop": {"forms": right}}), tmp_path / "run.ckpt")
    assert collapse_file(tmp_path / "run.ckpt", tmp_path / "small.ckpt")["source"] == "kernels"

    wrong = {"head.weight": right["head.weight"] + 0.5}
    torch.save(checkpoint(model, callbacks={"Sop": {"forms": wrong}}), tmp_path / "run.ckpt")
    with pytest.raises(CollapseError, match=r"difference 0\.5 .*'head.weight'"):
        collapse_file(tmp_path / "run.ckpt", tmp_path / "wrong.ckpt")
    assert not (tmp_path / "wrong.ckpt").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_collapse_file_with_names_of_compiled_parts(tmp_path, keep):
    model = CompiledInside(width=5)
    torch.save(checkpoint(model), tmp_path / "run.ckpt")
    receipt = collapse_file(tmp_path / "run.ckpt", tmp_path / "small.ckpt", keep_compiled_names=keep)
    kind = CompiledInside if keep else Toy
    loaded = kind.load_from_checkpoint(tmp_path / "small.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert ("stripped of '_orig_mod.'" in receipt["note"]) is not keep


def test_collapse_file_of_averaged_weights(tmp_path):
    model = Toy()
    torch.save(checkpoint(model, current_model_state={}, averaging_state={}), tmp_path / "run.ckpt")
    assert collapse_file(tmp_path / "run.ckpt", tmp_path / "small.ckpt")["source"] == "averaged"


def test_collapse_file_refuses_what_it_cannot_use(tmp_path):
    write(tmp_path / "x.deploy.ckpt", content_of(Toy()))
    with pytest.raises(DeployFileError, match="is a deploy file already"):
        collapse_file(tmp_path / "x.deploy.ckpt", tmp_path / "y.ckpt")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(DeployFileError, match="no Lightning checkpoint"):
        collapse_file(tmp_path / "other.ckpt", tmp_path / "y.ckpt")
    torch.save(checkpoint(Toy(), hyper_parameters={"layer": torch.nn.ReLU}), tmp_path / "class.ckpt")
    with pytest.raises(DeployFileError, match="add_safe_globals"):
        collapse_file(tmp_path / "class.ckpt", tmp_path / "y.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "class.ckpt").read_bytes()[:100])
    with pytest.raises(DeployFileError, match=r"cut.ckpt is corrupt or truncated"):
        collapse_file(tmp_path / "cut.ckpt", tmp_path / "y.ckpt")


# ---------------------------------------------------------------------- what is taken out of a checkpoint


def test_training_state_is_left_behind_and_the_modules_own_entries_are_kept():
    model = Toy()
    content = from_checkpoint(
        checkpoint(model, vocabulary={"a": 1}, tokenizer=object(), foreign=1, hparams_name="kwargs"), ignore={"foreign"}
    )
    assert content.extras == {
        "vocabulary": {"a": 1},
        "pytorch-lightning_version": "2.6.6",
        "hparams_name": "kwargs",
    }
    assert content.omitted == ("tokenizer",)


@pytest.mark.parametrize(("nested", "kept"), [(3, False), ({"class_path": "torch.nn.ReLU"}, True), ([{"a": 1}], True)])
def test_the_instantiator_is_kept_only_where_values_are_nested(nested, kept):
    path = "lightning.pytorch.cli.instantiate_module"
    hyper_parameters = {"activation": nested, "_instantiator": path, "_class_path": "deploy_toys.Toy"}
    content = from_checkpoint(checkpoint(Toy(), hyper_parameters=hyper_parameters))
    assert ("_instantiator" in content.hyper_parameters) is kept
