"""The command line: a whole life of a run, the dry run, and every mistake told in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from lightning_sop.cli import main
from lightning_sop.zoo import ImageClassifier

ROOT = Path(__file__).parents[1]
MLP = str(ROOT / "configs/digits_mlp.yaml")
MAJORITY = str(ROOT / "configs/digits_majority.yaml")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No words of pytest's on the command line, and an empty working directory."""
    monkeypatch.setattr(sys, "argv", ["lightning-sop"])
    monkeypatch.chdir(tmp_path)


def fit(*words, config=MAJORITY):
    short = ["--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    return main(["fit", "--config", config, *short, *words])


class BuiltLate(LightningModule):
    """A module whose layers do not exist before configure_model."""

    def configure_model(self):
        self.late = nn.Linear(3, 2)


class Widths(LightningDataModule):
    """Data whose width is known once they are set up; ``lost`` is a reason why they cannot be."""

    def __init__(self, lost: str = ""):
        super().__init__()
        self.lost = lost

    def prepare_data(self):
        raise AssertionError("a dry run downloads nothing")

    def setup(self, stage):
        if self.lost:
            raise FileNotFoundError(f"{self.lost}\nlook for it")
        assert stage == "fit"
        self.width = 7


class BuiltInSetup(LightningModule):
    """A module that builds a layer in setup(), as wide as its data, one in configure_model() and one before."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def setup(self, stage):
        assert stage == "fit" and self.trainer.training and self.trainer.lightning_module is self
        self.body = nn.Linear(getattr(self.trainer.datamodule, "width", 5), 4)

    def configure_model(self):
        self.neck = nn.Linear(self.body.out_features, 4)


class SetupOfData(BuiltInSetup):
    """Cannot be built without its data."""

    def setup(self, stage):
        self.body = nn.Linear(self.trainer.datamodule.width, 4)


class Broken(LightningModule):
    """Nothing but a bug in configure_model()."""

    def configure_model(self):
        self.late = {}["layer"]


class Defective(ImageClassifier):
    """A module with a bug."""

    def training_step(self, batch, batch_idx):
        return {}["loss"]


def test_a_whole_run(tmp_path, capsys):
    assert fit() == 0
    (deploy_file,) = tmp_path.glob("checkpoints/*.deploy.ckpt")
    (training_file,) = set(tmp_path.glob("checkpoints/*.ckpt")) - {deploy_file}
    for command in ("validate", "test", "predict"):
        words = ["--config", MAJORITY, "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
        capsys.readouterr()
        assert main([command, *words, "--ckpt_path", str(training_file)]) == 0
        assert "test_acc" in capsys.readouterr().out or command != "test"
    assert main(["collapse", str(training_file), "-o", "small.ckpt"]) == 0
    assert "wrote small.ckpt" in capsys.readouterr().out
    written = torch.load("small.ckpt", weights_only=True)["state_dict"]
    beside = torch.load(deploy_file, weights_only=True)["state_dict"]
    assert written.keys() == beside.keys() == ImageClassifier().state_dict().keys()
    for name, weight in written.items():
        torch.testing.assert_close(weight, beside[name])
    ImageClassifier.load_from_checkpoint("small.ckpt")
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    capsys.readouterr()
    assert main(["test", "--config", MLP, *quiet, "--ckpt_path", "small.ckpt"]) == 0  # the plain model, with its own width
    assert "test_acc" in capsys.readouterr().out


def test_collapse_names_its_file_and_casts(tmp_path):
    assert fit(config=MLP) == 0
    (training_file,) = tmp_path.glob("checkpoints/*.ckpt")
    assert main(["collapse", str(training_file), "--dtype", "bfloat16"]) == 0
    (deploy_file,) = tmp_path.glob("checkpoints/*.deploy.ckpt")
    written = torch.load(deploy_file, weights_only=True)["state_dict"]
    assert {weight.dtype for weight in written.values()} == {torch.bfloat16}


@pytest.mark.parametrize("keep", [False, True])
def test_collapse_keeps_the_names_of_compiled_parts_where_asked(keep, capsys):
    names = ["net._orig_mod.weight", "head.weight"]
    torch.save({"state_dict": {name: torch.ones(2, 2) for name in names}}, "run.ckpt")
    assert main(["collapse", "run.ckpt", "-o", "small.ckpt", *["--keep_compiled_names"][:keep]]) == 0
    written = list(torch.load("small.ckpt", weights_only=True)["state_dict"])
    assert written == (names if keep else ["net.weight", "head.weight"])
    assert ("stripped of '_orig_mod.'" in capsys.readouterr().out) is not keep


@pytest.mark.filterwarnings("ignore:.*will be overridden by")  # which is what this user asks for
def test_an_optimizer_of_the_users(tmp_path):
    words = ["--optimizer=SGD", "--optimizer.lr=0.05", "--optimizer.momentum=0.9", "--lr_scheduler=ExponentialLR"]
    assert fit(*words, "--lr_scheduler.gamma=0.5") == 0
    (training_file,) = set(tmp_path.glob("checkpoints/*.ckpt")) - set(tmp_path.glob("checkpoints/*.deploy.ckpt"))
    checkpoint = torch.load(training_file, weights_only=True)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["momentum"] == 0.9
    assert len(group["params"]) == len(list(ImageClassifier().parameters()))
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [0.05]


def test_inspect_shows_every_parameter_and_why(capsys):
    assert main(["inspect", "--config", MAJORITY]) == 0
    output = capsys.readouterr().out
    names = [name for name, _ in ImageClassifier().named_parameters()]
    assert [name for name in names if name not in output] == []
    assert "exclude" in next(line for line in output.splitlines() if "net.head.weight" in line)
    # two hidden weights of 64 x 64 are trained as four kernels each; two biases and the head stay as they are
    plain = 2 * (64 * 64 + 64) + 64 * 10 + 10
    assert f"{plain:,}" in output
    assert f"{plain + 2 * 3 * 64 * 64:,}" in output


def test_inspect_reads_what_fit_prints(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", MAJORITY, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert main(["inspect", "--config", "printed.yaml"]) == 0
    assert "net.hidden.0.weight" in capsys.readouterr().out


def test_inspect_builds_late_layers(capsys):
    callback = "--trainer.callbacks=lightning_sop.SimulatedOverparam"
    assert main(["inspect", f"--model={__name__}.BuiltLate", callback, "--trainer.logger=false"]) == 0
    assert "late.weight" in capsys.readouterr().out


def inspected(module, capsys, *words):
    """The table and the notes of a dry run of one of this file's modules."""
    model, callback = f"--model={__name__}.{module.__name__}", "--trainer.callbacks=lightning_sop.SimulatedOverparam"
    assert main(["inspect", model, callback, *words, "--trainer.accelerator=cpu"]) == 0
    captured = capsys.readouterr()
    return captured.out, [line for line in captured.err.splitlines() if line.startswith("lightning-sop: note: ")]


DATA = f"--data={__name__}.Widths"
LOST = DATA, "--data.lost=no such folder"


@pytest.mark.parametrize("words", [(), ("--trainer.strategy=ddp", "--trainer.devices=2")], ids=["one", "two processes"])
@pytest.mark.parametrize("module", [BuiltInSetup, SetupOfData])
def test_inspect_builds_the_layers_of_setup(module, words, capsys):
    table, notes = inspected(module, capsys, DATA, *words)
    assert [name for name in ("head.weight", "body.weight", "neck.weight") if name not in table] == []
    assert "4x7" in table  # the data were set up, and before the module
    assert notes == []


def test_inspect_builds_the_layers_of_setup_without_data(capsys):
    table, notes = inspected(BuiltInSetup, capsys)
    assert "4x5" in table and notes == []


def test_inspect_sets_up_no_data_that_nobody_reads(capsys):
    assert inspected(BuiltLate, capsys, *LOST)[1] == []


def test_inspect_without_the_data_shows_what_can_be_built(capsys):
    table, (note,) = inspected(BuiltInSetup, capsys, *LOST)
    assert "neck.weight" in table
    assert "Widths.setup() cannot run without training" in note
    assert note.endswith("FileNotFoundError: no such folder look for it")


def test_inspect_shows_what_exists_where_setup_fails(capsys):
    table, (*_, ours, then) = inspected(SetupOfData, capsys, *LOST)
    assert "head.weight" in table and "body" not in table
    assert "SetupOfData.setup() cannot run without training" in ours and "AttributeError: 'Widths'" in ours
    assert "SetupOfData.configure_model() could not run after that: AttributeError: 'SetupOfData'" in then


def test_inspect_keeps_the_traceback_of_a_defect(capsys):
    with pytest.raises(KeyError, match="layer"):
        inspected(Broken, capsys)


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert [word for word in ("fit", "validate", "test", "predict", "inspect", "collapse") if word not in output] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], 'expected "subcommand"'),
        (["train"], "invalid choice: 'train'"),
        (["fit", "--config", "none.yaml"], "none.yaml"),
        (["fit", "--config", "text.ckpt"], "Problems parsing config"),
        (["fit", "--config", MLP, "--trainer.epochs=1"], "--trainer.epochs=1"),
        (["fit", "--config", MLP, "--model.net=cnn"], "'mlp', 'resnet', 'vit'"),
        (["fit", "--config", MLP, "--ckpt_path=none.ckpt", "--trainer.logger=false"], "none.ckpt"),
        (["fit", "--config", MLP, "--ckpt_path=text.ckpt", "--trainer.logger=false"], "text.ckpt"),
        (["fit", "--config", "data.yaml", "--trainer.logger=false"], "none/train-images-idx3-ubyte.gz: no such file"),
        (["fit", "--config", "factor.yaml"], "factor must be a whole number of kernels"),
        (["inspect", "--config", MLP], "no lightning_sop.SimulatedOverparam among trainer.callbacks"),
        (["inspect", "--config", "pattern.yaml"], "nowhere"),
        (["collapse", "none.ckpt"], "none.ckpt"),
        (["collapse", "text.ckpt"], "text.ckpt is corrupt"),
        (["collapse", "text.ckpt", "-o", "text.ckpt"], "would overwrite the training checkpoint"),
        (["collapse", "text.ckpt", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=lambda value: " ".join(value)[:60].replace(str(ROOT), "") if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(words, message, tmp_path, capsys):
    (tmp_path / "text.ckpt").write_text("no: checkpoint: at all")
    configuration = Path(MAJORITY).read_text()
    data = "{class_path: lightning_sop.zoo.IdxImages, init_args: {root: none}}"
    (tmp_path / "data.yaml").write_text(f"model: lightning_sop.zoo.ImageClassifier\ndata: {data}\n")
    (tmp_path / "factor.yaml").write_text(configuration.replace("factor: 4", "factor: 0"))
    (tmp_path / "pattern.yaml").write_text(configuration.replace("*.head", "nowhere"))
    assert main(words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert error[0].startswith("lightning-sop: error: ")
    assert message in error[0]


def test_a_defect_keeps_its_traceback():
    with pytest.raises(KeyError, match="loss"):
        fit(f"--model={__name__}.Defective", config=MLP)


def test_the_package_imports_without_the_tools_of_its_command():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['jsonargparse', 'wandb'])); "
        "from lightning_sop import SimulatedOverparam, CollapseOnSave, MajorityKernels, expand_, collapse_"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)
