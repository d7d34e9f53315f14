"""Modules that do more than most: look at their own layers, keep parameters by themselves, change between or after fits."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop import CollapseOnSave, DynamicsMonitor, MajorityKernels, SimulatedOverparam, TrainingCost
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.deploy import read
from tests.callbacks.helpers import Classifier, InSetup, fit, network, overparam, same_tensors, seeded, trainer

# Lightning's advice to resume with the same callbacks, which is what some of these tests do not do.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using")


def far(**options: Any) -> SimulatedOverparam:
    """Kernels so far apart that a mix is never taken for their mean."""
    return SimulatedOverparam(MajorityKernels(4, init="independent", anneal=0), verbose=False, **options)


# ---------------------------------------------------------------------- fits that fail, and fits after them


class SetupFails(pl.Callback):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        raise ValueError("an option of another callback is wrong")


@pytest.mark.parametrize("corrected", [True, False])
def test_a_fit_that_failed_before_the_layers_were_there_leaves_nothing(tmp_path: Path, corrected: bool) -> None:
    model = seeded(InSetup)
    with pytest.raises(ValueError, match="another callback"):
        fit(model, tmp_path, overparam(3), SetupFails())
    assert "setup" not in model.__dict__
    if corrected:
        fit(model, tmp_path, overparam(3))  # not refused as a second callback
    fit(model, tmp_path)
    plain = seeded(InSetup)
    if corrected:
        fit(plain, tmp_path, overparam(3))
    fit(plain, tmp_path)
    assert same_tensors(model.state_dict(), plain.state_dict())
    assert not [name for name, _ in model.named_modules() if "form" in name]


def test_methods_that_are_wrapped_are_those_of_the_object_again(tmp_path: Path) -> None:
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            own = next(callback for callback in trainer.callbacks if isinstance(callback, SimulatedOverparam))
            seen.append("save_checkpoint" in trainer.__dict__)
            pickle.loads(pickle.dumps(own))
            assert copy.deepcopy(own)._patches == []

    model = seeded(InSetup)
    run = fit(model, tmp_path, overparam(3, include=["net.0"]), overparam(2, include=["net.4"]), Look())
    assert seen == [True]
    assert "save_checkpoint" not in run.__dict__
    assert "setup" not in model.__dict__


def test_a_layer_may_be_replaced_between_fits(tmp_path: Path) -> None:
    model, callback = seeded(Classifier), overparam(3)
    trainer(tmp_path, callback).fit(model)
    kept = callback.engine.forms["net.0.weight"]
    model.net[4] = nn.Linear(32, 5)
    saved = ModelCheckpoint(tmp_path, filename="{epoch}")
    run = trainer(tmp_path, callback, CollapseOnSave(), saved, max_epochs=1)
    run.fit(model)
    assert callback.engine.forms["net.0.weight"] is kept  # goes on
    assert callback.engine.forms["net.4.weight"].built
    for name, weight in callback.collapsed_weights().items():
        assert torch.allclose(model.state_dict()[name].double(), weight, atol=1e-6)
    assert (tmp_path / "epoch=0.deploy.ckpt").exists()
    model.net[4] = nn.Linear(32, 7)  # of another size: also a checkpoint can be resumed from
    run = trainer(tmp_path, callback, ModelCheckpoint(tmp_path, filename="seven"), max_epochs=1)
    run.fit(model)
    trainer(tmp_path, callback, max_epochs=2).fit(model, ckpt_path=tmp_path / "seven.ckpt", weights_only=True)


# ---------------------------------------------------------------------- modules that look at themselves


class Decaying(Classifier):
    """Penalizes whatever has a weight."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        weights = [module.weight for module in self.modules() if hasattr(module, "weight")]
        return super().training_step(batch, batch_idx) + 0.1 * sum(weight.square().sum() for weight in weights)


def test_a_form_has_no_weight_of_its_own(tmp_path: Path) -> None:
    one, plain = seeded(Decaying), seeded(Decaying)
    fit(one, tmp_path, overparam(1))
    fit(plain, tmp_path)
    assert same_tensors(one.state_dict(), plain.state_dict())


class ByName(Classifier):
    """Saves parameters and not its state_dict, as for adapters."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}


class InTheHook(Classifier):
    """The same in its hook."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}


class Collapsed(pl.Callback):
    """What checkpoints of single steps ought to hold."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def __deepcopy__(self, memo: Any) -> Collapsed:
        return self

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        own = next(callback for callback in trainer.callbacks if isinstance(callback, SimulatedOverparam))
        self.weights[trainer.global_step] = own.collapsed_weights()


@pytest.mark.parametrize("make", [ByName, InTheHook, Classifier])
def test_checkpoints_of_parameters_are_collapsed(tmp_path: Path, make: Any) -> None:
    collapsed = Collapsed()
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    model = seeded(make)
    fit(model, tmp_path, far(), collapsed, saved)
    again = seeded(make)
    fit(again, tmp_path, far())
    assert same_tensors(dict(model.named_parameters()), dict(again.named_parameters()))  # saving changes nothing
    for step in (3, 6):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        for name, weight in collapsed.weights[step].items():
            assert torch.allclose(checkpoint[name].double(), weight, atol=1e-5)


def test_a_state_that_is_written_later_is_what_it_was(tmp_path: Path) -> None:
    states = []

    class Keep(pl.Callback):
        def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
            states.append((checkpoint["state_dict"], copy.deepcopy(checkpoint["state_dict"])))

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            later, now = states[-1]
            for name in ("net.0.weight", "net.4.weight"):
                assert torch.equal(later[name], now[name])

    fit(seeded(Classifier), tmp_path, far(), Keep(), max_epochs=1)
    assert len(states) == 4


class InTrainMode(Classifier):
    """Validates in training mode, where torchvision's detectors return losses."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net[0].train()
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))
        self.net[0].eval()


def test_validation_in_training_mode_is_of_the_collapsed_weights(tmp_path: Path) -> None:
    model = seeded(InTrainMode)
    run = fit(model, tmp_path, far(), max_epochs=1)
    deployed = trainer(tmp_path).validate(model, verbose=False)[0]["val_loss"]
    assert float(run.callback_metrics["val_loss"]) == deployed
    model = seeded(InTrainMode)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            seen.append(not torch.allclose(pl_module.net[0].weight, pl_module.net[0].weight_form.collapsed()))

    fit(model, tmp_path, far(), Look(), val_check_interval=2, max_epochs=1)
    assert seen == [True] * 4  # and training goes on with mixes


# ---------------------------------------------------------------------- optimizers that are made anew


class Renews(pl.Callback):
    """A warm restart: other optimizers from the second epoch on."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.strategy.setup_optimizers(trainer)


@pytest.mark.parametrize("factor", [1, 3])
def test_an_optimizer_that_was_made_anew_is_the_one_that_is_saved(tmp_path: Path, factor: int) -> None:
    def make() -> Classifier:
        return seeded(Classifier, shuffle=False, dropout=0.0)

    whole = make()
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, tmp_path, overparam(factor), Renews(), saved, max_epochs=4)
    resumed = make()
    fit(resumed, tmp_path, overparam(factor), ckpt=tmp_path / "epoch=2.ckpt", max_epochs=4)
    assert same_tensors(whole.state_dict(), resumed.state_dict())


def test_a_weight_without_values_is_resumed(tmp_path: Path) -> None:
    class Wide(Classifier):
        def __init__(self) -> None:
            super().__init__(shuffle=False, dropout=0.0)
            with pytest.warns(UserWarning, match="zero-element"):
                self.extra = nn.Linear(0, 5)

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + self.extra(inputs[:, :0])

    whole, resumed = seeded(Wide), seeded(Wide)
    fit(whole, tmp_path, overparam(3, seed=1), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    fit(resumed, tmp_path, overparam(3, seed=1), ckpt=tmp_path / "epoch=0.ckpt")
    assert same_tensors(whole.state_dict(), resumed.state_dict())


# ---------------------------------------------------------------------- what an optimizer holds and nobody trains


class WithTeacher(Classifier):
    """Learns from a network that the optimizer holds, too; from some step on that one learns as well."""

    def __init__(self, late: int = 100) -> None:
        super().__init__(shuffle=False, dropout=0.0)
        self.teacher = nn.Linear(10, 5)
        self.late, self.answers = late, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.set_grad_enabled(self.global_step >= self.late):
            answer = self.teacher(batch[0])
        self.answers.append(answer.detach())
        return loss + (self(batch[0]) - answer).square().mean()


def test_a_teacher_that_nobody_trains_answers_like_itself(tmp_path: Path) -> None:
    ours, plain = seeded(WithTeacher), seeded(WithTeacher)
    own = fit(ours, tmp_path, far()).callbacks[0]
    fit(plain, tmp_path)
    assert torch.allclose(ours.teacher.weight, plain.teacher.weight, atol=1e-6)
    assert not torch.allclose(ours.answers[0], plain.answers[0])  # at the first step nobody can know
    for left, right in zip(ours.answers[1:], plain.answers[1:], strict=True):
        assert torch.allclose(left, right, atol=1e-6)
    assert own.engine.forms["teacher.weight"].trained is False
    assert own.engine.forms["net.0.weight"].trained


def test_what_is_trained_later_gets_its_mix_then_and_resumes(tmp_path: Path) -> None:
    whole, resumed = seeded(WithTeacher, 6), seeded(WithTeacher, 6)
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    own = fit(whole, tmp_path, far(seed=1), saved, max_epochs=3).callbacks[0]
    assert own.engine.forms["teacher.weight"].trained
    fit(resumed, tmp_path, far(seed=1), ckpt=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert same_tensors(whole.state_dict(), resumed.state_dict())
    plain = seeded(WithTeacher, 6)
    fit(plain, tmp_path, overparam(1), max_epochs=3)
    without = seeded(WithTeacher, 6)
    fit(without, tmp_path, max_epochs=3)
    assert same_tensors(plain.state_dict(), without.state_dict())


# ---------------------------------------------------------------------- modules in files, and TorchScript


class Given(Classifier):
    """Has a network among its hyper-parameters, as Lightning's documentation advises against."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(dropout=0.0)
        self.save_hyperparameters(ignore=[])
        self.net = net
        self.hparams.update(optimizer="adamw", shuffle=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["parts"] = [self.net[0], "first"]
        checkpoint["parts"].append(checkpoint["parts"])


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of")
@pytest.mark.parametrize("weights_only", [False, True])
def test_modules_in_a_checkpoint_are_plain(tmp_path: Path, weights_only: bool) -> None:
    model = seeded(lambda: Given(network()))
    collapsed = Collapsed()
    fit(model, tmp_path, far(), collapsed, ModelCheckpoint(tmp_path, filename="x", save_weights_only=weights_only))
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)
    for part in (saved["hyper_parameters"]["net"], saved["parts"][0]):
        assert all(type(layer).__module__.startswith("torch.") for layer in part.modules())
    assert same_tensors(saved["hyper_parameters"]["net"].state_dict(), network_of(saved["state_dict"]))
    assert saved["parts"][1] == "first"
    loaded = Given.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert [type(layer) for layer in loaded.modules()] == [type(layer) for layer in model.modules()]


def network_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("net."): tensor for name, tensor in state.items()}


def test_a_callback_that_trained_another_module_since_saves_the_weights_alone(tmp_path: Path) -> None:
    shared, runs = far(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        run = trainer(tmp_path, shared, CollapseOnSave(verbose=False), max_epochs=1)
        run.fit(Classifier())
        runs.append(run)
    with pytest.warns(UserWarning, match="trained another module since"):
        runs[0].save_checkpoint(tmp_path / "first.ckpt")
    runs[1].save_checkpoint(tmp_path / "second.ckpt")
    first, second = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("first", "second"))
    assert shared.state_key not in first["callbacks"] and shared.state_key in second["callbacks"]
    assert same_tensors(first["state_dict"], runs[0].lightning_module.state_dict())
    for name, run in zip(("first", "second"), runs, strict=True):
        deployed = Classifier.load_from_checkpoint(tmp_path / f"{name}.deploy.ckpt")
        assert same_tensors(deployed.state_dict(), run.lightning_module.state_dict())


class Tied(Classifier):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10), nn.Linear(10, 5))
        self.net[2].weight = self.net[0].weight


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("build", [Classifier, Tied])
def test_torchscript_takes_the_layers(tmp_path: Path, build: Any) -> None:
    answers = []

    class Scripts(pl.Callback):
        def check(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            training = pl_module.net.training
            scripted = torch.jit.script(pl_module.net.eval())
            inputs = torch.randn(3, 10)
            answers.append(torch.equal(scripted(inputs), pl_module.net(inputs)))
            scripted.save(tmp_path / "net.pt")
            assert [name for name, _ in scripted.named_parameters()] == [
                name for name, _ in pl_module.net.named_parameters()
            ]
            pl_module.net.train(training)

        on_train_batch_end = on_validation_end = on_train_end = check

    model = seeded(build)
    fit(model, tmp_path, far(), Scripts(), max_epochs=1)
    loaded, inputs = torch.jit.load(tmp_path / "net.pt"), torch.randn(3, 10)
    assert torch.equal(loaded(inputs), model.net.eval()(inputs))
    assert len(answers) == 7 and all(answers)


# ---------------------------------------------------------------------- copies on which something is measured


class InClosures(Classifier):
    """Calls its network through a lambda, and collects activations in a hook that knows the module."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.activations: list[Tensor] = []
        self.answer = lambda inputs: self.net(inputs)
        self.net[2].register_forward_hook(lambda module, args, output: self.activations.append(output))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.answer(inputs)

    def on_validation_end(self) -> None:
        self.activations.clear()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        seen = [activation.abs().mean() for activation in self.activations]
        self.activations.clear()
        return loss + 0.1 * torch.stack(seen).sum()


@pytest.mark.parametrize(
    "measuring",
    [
        lambda: TrainingCost(verbose=False),
        lambda: CollapseOnSave(verbose=False),
        lambda: DynamicsMonitor(every=1, slow=1),
    ],
)
def test_functions_that_know_the_module_lead_a_copy_to_itself(tmp_path: Path, measuring: Any) -> None:
    plain, measured = seeded(InClosures), seeded(InClosures)
    fit(plain, tmp_path / "plain", far(), ModelCheckpoint(tmp_path, filename="p", every_n_train_steps=1, save_top_k=-1))
    saving = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=1)
    run = fit(measured, tmp_path / "own", far(), measuring(), saving, logger=CSVLogger(tmp_path))
    callback = run.callbacks[1]  # type: ignore[attr-defined]
    assert measured.losses == plain.losses
    assert same_tensors(measured.state_dict(), plain.state_dict())  # the statistics of BatchNorm, too
    if isinstance(callback, TrainingCost):
        assert callback.flops > 0
    for path in tmp_path.glob("x*.deploy.ckpt"):
        assert read(path).receipt["output_difference"] < 1e-5


def test_a_copied_function_has_its_own_closure_defaults_and_attributes() -> None:
    module = seeded(Classifier)

    def inner(inputs: Tensor) -> Tensor:
        return module.net(inputs)

    def outer(inputs: Tensor, *, factor: float = 2.0) -> Tensor:
        return factor * inner(inputs) if inputs is not None else outer(inputs)

    outer.note = "mine"  # type: ignore[attr-defined]
    module.answer = outer
    module.free = torch.relu  # has no closure
    twin = plain_copy(module.eval())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    inputs = torch.ones(2, 10)
    assert twin.answer(inputs).abs().sum() > 0 and module.answer(inputs).abs().sum() == 0
    torch.testing.assert_close(twin.answer(inputs, factor=3.0), 3 * twin.net(inputs))
    assert twin.answer.note == "mine" and twin.free is torch.relu


# ---------------------------------------------------------------------- layers that come and go


class Replaces(Classifier):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[4] = nn.Linear(32, 5)
            self.trainer.optimizers[0].add_param_group({"params": list(self.net[4].parameters())})


def test_a_layer_that_is_replaced_while_it_is_trained_is_told(tmp_path: Path) -> None:
    model = seeded(Replaces)
    with pytest.raises(RuntimeError, match=r"net\.4\.weight is no longer in the model, which has another layer there"):
        fit(model, tmp_path, far(), max_epochs=2)
    assert not [name for name, _ in model.named_modules() if "form" in name]


class Copies(Classifier):
    def __init__(self, moment: str) -> None:
        super().__init__()
        setattr(self, moment, self.copy_network)

    def copy_network(self) -> None:
        self.average = copy.deepcopy(self.net).requires_grad_(False)


@pytest.mark.parametrize("moment", ["on_fit_start", "on_train_start", "on_train_epoch_end"])
def test_copies_of_layers_that_the_module_makes_are_plain_after_the_fit(tmp_path: Path, moment: str) -> None:
    model = Copies(moment)
    fit(model, tmp_path, far())
    assert all(type(part).__module__.startswith("torch.") for part in model.average.modules())
    assert all(type(part).__module__.startswith("torch.") for part in model.net.modules())


@pytest.mark.parametrize(
    "callback", [far(), CollapseOnSave(verbose=False), TrainingCost(verbose=False), DynamicsMonitor()], ids=type
)
def test_modules_of_another_lightning_are_refused_by_name(tmp_path: Path, callback: pl.Callback) -> None:
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} is for .* Linear is none"):
        callback.setup(trainer(tmp_path, callback), nn.Linear(2, 2), "fit")  # type: ignore[arg-type]
