"""What CollapseOnSave writes, and when it refuses."""

from __future__ import annotations

import pytest
import torch
from deploy_toys import Extras, Kernels, NoHyperParameters, Tied, Toy, data, differing, fit, names
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_sop.callbacks.collapse_on_save import CollapseOnSave
from lightning_sop.deploy import CollapseError, read, verify

# ---------------------------------------------------------------------- the file


def test_the_file_loads_strictly_and_tells_where_it_comes_from(tmp_path):
    run, model = fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=Toy(width=7))
    assert names(tmp_path) == ["x.ckpt", "x.deploy.ckpt"]
    assert not differing(model, Toy.load_from_checkpoint(tmp_path / "x.deploy.ckpt"))
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert (receipt["source"], receipt["training_file"]) == ("kernels", "x.ckpt")
    assert (receipt["global_step"], receipt["epoch"]) == (3, 0)
    assert receipt["output_difference"] == 0
    assert receipt["weight_difference"] == 0
    assert receipt["probe"] == [{"module": "", "shapes": [[4, 4]]}]
    assert receipt["dtype"] == "float32"
    assert receipt["versions"]["torch"] == torch.__version__
    run.test(model, data(), ckpt_path=str(tmp_path / "x.deploy.ckpt"), verbose=False)


def test_safetensors_beside_ckpt(tmp_path):
    callbacks = [CollapseOnSave(), CollapseOnSave(format="safetensors", dtype="bfloat16")]
    fit(tmp_path, Kernels(), *callbacks, ModelCheckpoint(tmp_path, filename="x"))
    assert names(tmp_path) == ["x.ckpt", "x.deploy.ckpt", "x.deploy.safetensors"]
    content = read(tmp_path / "x.deploy.safetensors")
    assert {t.dtype for t in content.state_dict.values() if t.is_floating_point()} == {torch.bfloat16}
    assert 0 < content.receipt["output_difference_relative"] < 0.1
    assert content.hyper_parameters == {"width": 6}


def test_two_of_one_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Two CollapseOnSave callbacks would write the same files"):
        fit(tmp_path, CollapseOnSave(), CollapseOnSave(dtype="bfloat16"))


def test_a_model_without_hyper_parameters(tmp_path):
    _, model = fit(tmp_path, CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=NoHyperParameters())
    assert not differing(model, NoHyperParameters.load_from_checkpoint(tmp_path / "x.deploy.ckpt"))
    assert verify(tmp_path / "x.deploy.ckpt")["source"] == "plain"


def test_the_modules_own_entries_are_kept_and_odd_hyper_parameters_listed(tmp_path):
    fit(tmp_path, EMAWeightAveraging(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=Extras())
    content = read(tmp_path / "x.deploy.ckpt")
    assert content.extras["vocabulary"] == ["a", "b"]
    assert set(content.extras) == {"vocabulary", "pytorch-lightning_version", "hparams_name"}
    assert content.receipt["omitted"] == ["activation"]
    Extras.load_from_checkpoint(tmp_path / "x.deploy.ckpt")


def test_a_tied_model_is_as_small_as_the_plain_one(tmp_path):
    fit(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"), model=Tied())
    content = read(tmp_path / "x.deploy.ckpt")
    assert content.receipt["values"] == sum(p.numel() for p in Tied().parameters())
    weights = content.state_dict
    assert weights["again.weight"].data_ptr() == weights["net.2.weight"].data_ptr()


# ---------------------------------------------------------------------- the refusal


@pytest.mark.parametrize("io", [None, AsyncCheckpointIO()], ids=["sync", "async"])
def test_a_wrong_collapse_is_refused(tmp_path, io):
    callbacks = [Kernels(error=0.25), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x")]
    with pytest.raises(CollapseError, match=r"output difference [0-9.]+ .*weight difference 0\.25 .*'head.weight'"):
        fit(tmp_path, *callbacks, plugins=[io] if io else None)
    assert names(tmp_path) == ["x.ckpt"]


def test_a_refusal_removes_the_deploy_file_of_an_earlier_save_and_may_warn(tmp_path):
    kernels = Kernels()
    run, _ = fit(tmp_path, kernels, CollapseOnSave(on_mismatch="warn"), enable_checkpointing=False)
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert names(tmp_path) == ["x.ckpt", "x.deploy.ckpt"]
    kernels.error = 0.25
    with pytest.warns(UserWarning, match="x.deploy.ckpt was refused"):
        run.save_checkpoint(tmp_path / "x.ckpt")
    assert names(tmp_path) == ["x.ckpt"]


def test_the_tolerance_decides(tmp_path):
    callbacks = [Kernels(error=1e-3), CollapseOnSave(tolerance=0.5), ModelCheckpoint(tmp_path, filename="x")]
    fit(tmp_path, *callbacks)
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert 5e-4 < receipt["weight_difference"] < 2e-3
    assert receipt["output_difference"] > 1e-4
    assert receipt["tolerance"] == 0.5


def test_float16_that_overflows_is_refused(tmp_path):
    model = Toy()
    with torch.no_grad():
        model.head.weight.fill_(1e6)
    with pytest.raises(CollapseError, match=r"relative inf, tolerance 0.02\) in 'head.weight'"):
        fit(tmp_path, CollapseOnSave(dtype="float16"), ModelCheckpoint(tmp_path, filename="x"), model=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "format='onnx' is unknown"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"only": "worst"}, "only='worst' is unknown"),
        ({"on_mismatch": "ignore"}, "on_mismatch='ignore' is unknown"),
        ({"tolerance": -1.0}, r"tolerance=-1.0 must be"),
        ({"tolerance": float("nan")}, r"tolerance=nan must be"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        CollapseOnSave(**options)


@pytest.mark.parametrize(
    ("options", "checkpoint", "message"),
    [
        ({"only": "best"}, None, "needs a ModelCheckpoint in"),
        ({"only": "last"}, {}, "needs a ModelCheckpoint\\(save_last=True\\)"),
        ({"keep_training_file": False}, {"save_last": "link"}, "would link to a file"),
    ],
)
def test_options_that_do_not_fit_the_trainer(tmp_path, options, checkpoint, message):
    callbacks = [CollapseOnSave(**options), *([] if checkpoint is None else [ModelCheckpoint(tmp_path, **checkpoint)])]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, *callbacks, enable_checkpointing=checkpoint is not None)


# ---------------------------------------------------------------------- averaging


def test_ema_deploys_the_averaged_weights(tmp_path):
    callbacks = [Kernels(), EMAWeightAveraging(decay=0.5), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x")]
    fit(tmp_path, *callbacks, max_epochs=2)
    content = read(tmp_path / "x.deploy.ckpt")
    training = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content.receipt["source"] == "averaged"
    assert content.receipt["output_difference"] == 0
    assert all(torch.equal(content.state_dict[k], v) for k, v in training["state_dict"].items())
    assert not torch.equal(content.state_dict["head.weight"], training["current_model_state"]["head.weight"])


def test_swa(tmp_path):
    callbacks = [StochasticWeightAveraging(1e-2, swa_epoch_start=1), CollapseOnSave()]
    run, model = fit(tmp_path, *callbacks, max_epochs=3, enable_checkpointing=False)
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert not differing(model, Toy.load_from_checkpoint(tmp_path / "x.deploy.ckpt"))
