"""CollapseOnSave together with SimulatedOverparam, several processes, torch.compile and models nobody here wrote."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from deploy_toys import CompiledInside, Kernels, Tied, Toy, data, trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_sop.callbacks.collapse_on_save import CollapseOnSave
from lightning_sop.callbacks.simulated_overparam import SimulatedOverparam
from lightning_sop.deploy import collapse_file, load_into, read, verify
from lightning_sop.reparam import MajorityKernels

HERE = Path(__file__).parent


def overparam() -> SimulatedOverparam:
    return SimulatedOverparam(MajorityKernels(factor=3), seed=1, verbose=False)


def assert_deployed(path, model) -> dict:
    """The file holds the model's own weights, and the proof is about kernels and outputs."""
    content = read(path)
    state = model.state_dict()
    assert list(content.state_dict) == [name.replace("_orig_mod.", "") for name in state]
    for (name, ours), theirs in zip(content.state_dict.items(), state.values(), strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), msg=name)
    assert content.receipt["source"] == "kernels"
    assert content.receipt["output_difference_relative"] < 1e-5
    return content.receipt


@pytest.mark.parametrize("io", [None, AsyncCheckpointIO()], ids=["sync", "async"])
@pytest.mark.parametrize("model", [Toy, Tied])
def test_simulated_overparam(tmp_path, model, io):
    saves = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=2, save_top_k=1, enable_version_counter=False)
    net = model()
    run = trainer(tmp_path, overparam(), CollapseOnSave(), saves, plugins=[io] if io else None)
    run.fit(net, data(samples=32))
    assert_deployed(tmp_path / "x.deploy.ckpt", net)
    assert not any("form" in name for name, _ in model.load_from_checkpoint(tmp_path / "x.deploy.ckpt").named_modules())
    again = collapse_file(tmp_path / "x.ckpt", tmp_path / "y.ckpt")
    assert (again["source"], again["sha256"]) == ("kernels", verify(tmp_path / "x.deploy.ckpt")["sha256"])


def test_a_wrong_weight_under_simulated_overparam_is_refused(tmp_path):
    class Meddles(pl.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["state_dict"]["head.weight"] = checkpoint["state_dict"]["head.weight"] + 0.1

    run = trainer(tmp_path, overparam(), Meddles(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x"))
    with pytest.raises(RuntimeError, match=r"x.deploy.ckpt was refused.* in 'head.weight'"):
        run.fit(Toy(), data())
    assert not (tmp_path / "x.deploy.ckpt").exists()


def test_saving_after_fit_when_the_training_forms_are_gone(tmp_path):
    net = Toy()
    run = trainer(tmp_path, overparam(), CollapseOnSave(), enable_checkpointing=False)
    run.fit(net, data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert verify(tmp_path / "x.deploy.ckpt")["output_difference"] < 1e-6
    assert torch.equal(read(tmp_path / "x.deploy.ckpt").state_dict["head.weight"], net.head.weight)


def test_what_a_trainer_saves_whose_callback_is_another_ones_by_now_has_no_deploy_file(tmp_path):
    callbacks = [CollapseOnSave(verbose=False)]
    runs = [trainer(tmp_path, *callbacks, enable_checkpointing=False) for _ in range(2)]
    for run, width in zip(runs, (6, 9), strict=True):
        run.fit(Toy(width), data())
    with pytest.warns(UserWarning, match=r"set up by another Trainer since.*None is written beside .*first.ckpt"):
        runs[0].save_checkpoint(tmp_path / "first.ckpt")
    runs[1].save_checkpoint(tmp_path / "second.ckpt")
    assert [path.name for path in tmp_path.glob("*.deploy.ckpt")] == ["second.deploy.ckpt"]
    assert (tmp_path / "first.ckpt").exists()


class Encoders(Toy):
    """Its step calls transformers' layers, for which torch has a fast path in evaluation, if nothing hooks them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(2)])

    def forward(self, x):
        x = x[:, None]
        for layer in self.layers:
            x = layer(x)
        return super().forward(x[:, 0])


def test_fast_paths_of_torch_are_taken_as_without_the_callback(tmp_path, monkeypatch):
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: (taken.append(0), fast(*args))[1])
    counts = []
    for callbacks in ([], [CollapseOnSave(verbose=False)]):
        taken.clear()
        torch.manual_seed(0)
        trainer(tmp_path, *callbacks, ModelCheckpoint(tmp_path), num_sanity_val_steps=0, max_epochs=1).fit(
            Encoders(), data(), data()
        )
        counts.append(len(taken))
    assert counts[0] > 0
    assert counts[1] >= counts[0]  # the proof's calls take it, too


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(1e-2, 1)], ids=type)
def test_averaging_and_simulated_overparam(tmp_path, averaging):
    callbacks = [overparam(), averaging, CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x")]
    net = Toy()
    run = trainer(tmp_path, *callbacks, max_epochs=3)
    run.fit(net, data(), data())
    during, after = tmp_path / "x.deploy.ckpt", tmp_path / "after.deploy.ckpt"
    assert verify(during)["source"] == ("averaged" if isinstance(averaging, EMAWeightAveraging) else "kernels")
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert not differing_from_file(net, Toy.load_from_checkpoint(after))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path, precision):
    net = Toy()
    run = trainer(tmp_path, overparam(), CollapseOnSave(), enable_checkpointing=False, precision=precision)
    run.fit(net, data(), data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert receipt["output_difference_relative"] < (0.02 if precision == "bf16-true" else 1e-6)
    assert receipt["dtype"] == {"bf16-mixed": "float32", "bf16-true": "bfloat16", "64-true": "float64"}[precision]


# ---------------------------------------------------------------------- torch.compile


class CompiledSaves(pl.Callback):
    """Saves while everything is compiled, and counts the graphs."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


class Silent(Toy):
    """Logs nothing: torch 2.13 cannot compile Lightning's ``log``."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("whole", [False, True], ids=["net", "module"])
def test_compiled(tmp_path, whole):
    torch._dynamo.reset()
    counter = CompileCounter()
    net = Silent()
    fitted = torch.compile(net, backend=counter, fullgraph=True) if whole else net
    if not whole:
        net.net = torch.compile(net.net, backend=counter, fullgraph=True)
    saves = CompiledSaves(tmp_path / "x.ckpt")
    run = trainer(tmp_path, Kernels(), CollapseOnSave(), saves, max_epochs=2, enable_checkpointing=False)
    run.fit(fitted, data())
    assert counter.frame_count == 1
    assert not differing_from_file(net, Silent.load_from_checkpoint(tmp_path / "x.deploy.ckpt"))
    receipt = verify(tmp_path / "x.deploy.ckpt")
    # Where the whole step is one graph, no call is ever seen.
    assert receipt["output_difference"] == (None if whole else 0)
    assert ("no forward call was recorded" in receipt["note"]) == whole


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at every input's
@pytest.mark.parametrize("kind", [Toy, CompiledInside])
@pytest.mark.parametrize("outside", [False, True], ids=["as built", "head compiled"])
@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
def test_names_are_those_of_the_class_built_anew(tmp_path, kind, outside, format):
    net = kind()
    if outside:
        net.head = torch.compile(net.head, backend="eager")
    trainer(tmp_path, overparam(), CollapseOnSave(format), ModelCheckpoint(tmp_path, filename="x")).fit(net, data())
    file = tmp_path / f"x.deploy.{format}"
    assert sorted(read(file).state_dict) == sorted(kind().state_dict())
    assert verify(file)["note"] == ""
    assert verify(file)["source"] == "kernels"
    twins = [kind(), Toy(), CompiledInside()]
    for twin in twins:
        load_into(twin, file)
    if format == "ckpt":
        twins.append(kind.load_from_checkpoint(file))
    for twin in twins:
        assert torch.equal(twin.eval()(torch.ones(2, 4)), net.eval()(torch.ones(2, 4)))


class Expensive(CompiledInside):
    """Counts how often it is built, and draws random numbers then."""

    built = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).built += 1
        self.scale = float(np.random.rand() + torch.rand(1, device="cpu"))


def test_the_class_is_built_anew_once_and_random_states_are_left_alone(tmp_path):
    net, states = Expensive(), []
    run = trainer(tmp_path, Kernels(), CollapseOnSave(), enable_checkpointing=False)
    run.fit(net, data())
    for name in "abc":
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()))
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    assert states[0] == states[1] == states[2]
    assert Expensive.built == 2
    assert list(read(tmp_path / "c.deploy.ckpt").state_dict) == list(net.state_dict())


class NeedsMore(CompiledInside):
    """Cannot be built from plain hyper-parameters alone."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_class_that_cannot_be_built_anew_gets_plain_names_and_a_remark(tmp_path):
    net = NeedsMore(activation=nn.ReLU)
    trainer(tmp_path, Kernels(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x")).fit(net, data())
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert "NeedsMore needs it is not known, for it could not be built anew (TypeError: " in receipt["note"]
    assert receipt["output_difference"] == 0
    assert list(read(tmp_path / "x.deploy.ckpt").state_dict) == list(Toy().state_dict())


def differing_from_file(trained, loaded) -> list[str]:
    pairs = zip(trained.state_dict().items(), loaded.state_dict().values(), strict=True)
    return [name for (name, a), b in pairs if not torch.equal(a, b)]


# ---------------------------------------------------------------------- others' models


def language_models():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **small)
        ),
        "bert": lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **small
            )
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, **small)
        ),
    }


class Language(pl.LightningModule):
    def __init__(self, name: str = "gpt2") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = language_models()[name]()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_transformers_with_tied_heads(tmp_path, name):
    tokens = torch.randint(0, 32, (8, 6), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=4)
    net = Language(name)
    trainer(tmp_path, overparam(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x")).fit(net, loader)
    receipt = assert_deployed(tmp_path / "x.deploy.ckpt", net)
    assert receipt["values"] <= sum(t.numel() for t in {id(t): t for t in [*net.parameters(), *net.buffers()]}.values())
    assert receipt["probe"][0]["module"] == "model"
    Language.load_from_checkpoint(tmp_path / "x.deploy.ckpt")


# ---------------------------------------------------------------------- LightningCLI


class Nested(Toy):
    """Has a module among its arguments, which only jsonargparse can build again."""

    def __init__(self, activation: nn.Module, width: int = 6) -> None:
        super().__init__(width)
        self.save_hyperparameters()
        self.net[2] = activation


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)  # it tells Lightning about its deprecations
@pytest.mark.filterwarnings("ignore:Attribute 'activation' is an instance of `nn.Module`:UserWarning")
@pytest.mark.parametrize("model", [Toy, Nested])
def test_lightning_cli(tmp_path, monkeypatch, model):
    arguments = [
        "script.py",
        "--model.width=5",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
    ]
    arguments += ["--model.activation=torch.nn.Tanh"] if model is Nested else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {**quiet, "default_root_dir": str(tmp_path), "callbacks": [overparam(), CollapseOnSave()]}
    monkeypatch.setattr(sys, "argv", arguments)
    cli = LightningCLI(model, run=False, trainer_defaults=defaults, save_config_callback=None, seed_everything_default=False)
    cli.trainer.fit(cli.model, data())
    cli.trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = model.load_from_checkpoint(tmp_path / "x.deploy.ckpt")
    assert ("_instantiator" in read(tmp_path / "x.deploy.ckpt").hyper_parameters) == (model is Nested)
    torch.testing.assert_close(loaded.eval()(torch.ones(2, 4)), cli.model.eval()(torch.ones(2, 4)))
