"""What cannot work says so before training starts, and names file, parameter and shapes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sop import DeepFusionGrow, FusionError
from tests.callbacks.growing import Growable, Watch, donor, grow, make, network
from tests.callbacks.helpers import fit, overparam, same_tensors, seeded, trainer


def refused(model: pl.LightningModule, folder: Path, match: str, *callbacks: Any, error: Any = FusionError) -> None:
    """The error comes before the first step, and the module is as it was."""
    before = copy.deepcopy(model.state_dict())
    run = trainer(folder, *callbacks)
    with pytest.raises(error, match=match):
        run.fit(model)
    assert run.global_step == 0 and same_tensors(dict(model.state_dict()), dict(before))
    assert not model._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"grown": None}, "say what the grown network is"),
        ({"grown": {}}, "say what the grown network is"),
        ({"copies": 0}, "1 to 8 donors can be fused, not 0"),
        ({"copies": 9}, "1 to 8 donors can be fused, not 9"),
        ({"learning_rate": "faster"}, "learning_rate must be match, keep, restart or a number, not 'faster'"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, not 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be a positive number"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DeepFusionGrow(**{"grown": {"width": 16}, **options})


def test_a_missing_file(tmp_path: Path) -> None:
    refused(make(), tmp_path, "donor nowhere.ckpt: no such file", grow(donors=["self", "nowhere.ckpt"]))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = Path(donor(tmp_path, "a", 1))
    path.write_bytes(path.read_bytes()[:-2000])
    refused(make(), tmp_path, r"donor .*a\.ckpt: corrupt, truncated, or no checkpoint", grow(donors=["self", str(path)]))
    path.write_bytes(b"")
    refused(make(), tmp_path, r"donor .*a\.ckpt: corrupt, truncated, or no checkpoint", grow(donors=["self", str(path)]))
    torch.save({"weights": 1}, path)
    refused(make(), tmp_path, r"donor .*a\.ckpt: corrupt, truncated, or no checkpoint", grow(donors=["self", str(path)]))


def test_missing_keys(tmp_path: Path) -> None:
    path = donor(tmp_path, "a", 1)
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["net.4.weight"]
    torch.save(content, path)
    refused(make(), tmp_path, r"donor .*a\.ckpt is no Growable.*Missing key.*net\.4\.weight", grow(donors=["self", path]))


def test_weights_of_other_shapes_than_their_own_hyper_parameters_say(tmp_path: Path) -> None:
    path = donor(tmp_path, "a", 1)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["net.4.weight"] = torch.zeros(3, 8)
    torch.save(content, path)
    match = r"donor .*a\.ckpt is no Growable.*net\.4\.weight.*\[3, 8\].*\[8, 8\]"
    refused(make(), tmp_path, match, grow(donors=["self", path]))


class Deep(Growable):
    def __init__(self, width: int = 8, depth: int = 1) -> None:
        super().__init__(width)
        self.more = nn.Sequential(*(nn.Linear(5, 5) for _ in range(depth)))


def test_another_architecture(tmp_path: Path) -> None:
    path = donor(tmp_path, "a", 1, model=Deep(depth=2))
    match = r"donors self, .*a\.ckpt: donor 2: more\.1\.bias, of shape \(5,\), is in the donor but not in the grown model"
    refused(seeded(Deep), tmp_path, match, grow(donors=["self", path]))


def test_a_checkpoint_of_another_class(tmp_path: Path) -> None:
    path = donor(tmp_path, "a", 1, model=Deep())
    refused(make(), tmp_path, r"donor .*a\.ckpt: Growable has no hyper-parameter 'depth'", grow(donors=["self", path]))


@pytest.mark.parametrize("width", [17, 12])
def test_widths_that_do_not_add_up(width: int, tmp_path: Path) -> None:
    match = rf"net\.0\.weight is of shape \({width}, 10\) in the grown model; donors of \(8, 10\), \(8, 10\) need \(16 or 8"
    refused(make(), tmp_path, match, grow(width=width))


def test_a_network_that_does_not_grow(tmp_path: Path) -> None:
    refused(make(), tmp_path, "donors self, self: the grown model is no larger than its donors", grow(width=8))


def test_a_second_event_is_checked_at_the_start_too(tmp_path: Path) -> None:
    match = r"net\.0\.weight is of shape \(24, 10\).*donors of \(16, 10\), \(16, 10\) need \(32 or 16"
    refused(make(), tmp_path, match, grow(3), grow(5, width=24))


def test_a_hyper_parameter_that_does_not_exist(tmp_path: Path) -> None:
    match = "Growable has no hyper-parameter 'size' saved; it has dropout, optimizer, scheduler, width"
    refused(make(), tmp_path, match, grow(grown={"size": 16}))


def test_a_nested_hyper_parameter_that_does_not_exist(tmp_path: Path) -> None:
    refused(make(), tmp_path, "'width.inner' leads nowhere.*'width' holds no others", grow(grown={"width.inner": 16}))


def test_a_value_that_the_class_refuses(tmp_path: Path) -> None:
    refused(make(), tmp_path, r"Growable cannot be built with \{'width': -1\} \(RuntimeError", grow(width=-1))


class Unsaved(pl.LightningModule):
    training_step, forward, train_dataloader = Growable.training_step, Growable.forward, Growable.train_dataloader

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = network(width)

    configure_optimizers = lambda self: torch.optim.SGD(self.parameters(), lr=0.1)  # noqa: E731


def test_a_module_without_saved_hyper_parameters(tmp_path: Path) -> None:
    refused(seeded(Unsaved), tmp_path, "Unsaved has no hyper-parameter 'width' saved; it has none: call self.save_", grow())


def test_hyper_parameters_that_do_not_make_the_network(tmp_path: Path) -> None:
    class Partly(Unsaved):
        def __init__(self, width: int = 8, inner: int = 5) -> None:
            super().__init__(width)
            self.save_hyperparameters(ignore=["inner"])
            self.tail = nn.Linear(5, inner)

    match = r"Partly built anew from its saved hyper-parameters is another network: tail.bias has shape \(5,\), here \(7,\)"
    refused(seeded(Partly, inner=7), tmp_path, match, grow())


def test_an_argument_that_was_not_saved(tmp_path: Path) -> None:
    class Lacking(Unsaved):
        def __init__(self, classes: int, width: int = 8) -> None:
            super().__init__(width)
            self.save_hyperparameters("width")

    match = "Lacking cannot be built anew: its argument 'classes' is not among the saved hyper-parameters"
    refused(seeded(Lacking, 3), tmp_path, match, grow())


@pytest.mark.parametrize(
    ("target", "grown", "match"),
    [
        ("body", {"class_path": "torch.nn.Linear"}, "target: Growable has no module 'body'"),
        ("net", {"class_path": "torch.nn.Missing"}, r"'torch\.nn\.Missing'.* cannot be built \(AttributeError"),
        ("net", {"class_path": "torch.nn.Linear", "init_args": {"width": 1}}, r"cannot be built \(TypeError"),
        ("net", {"class_path": "builtins.dict"}, "builtins.dict is no nn.Module"),
        ("net", {"class_path": "torch.nn.ReLU"}, "donor 1: net.0.bias, of shape"),
    ],
)
def test_wrong_targets(target: str, grown: dict[str, Any], match: str, tmp_path: Path) -> None:
    refused(make(), tmp_path, match, grow(target=target, grown=grown))


def test_events_with_and_without_target(tmp_path: Path) -> None:
    target = {"class_path": "tests.callbacks.growing.network", "init_args": {"width": 16}}
    events = grow(), grow(target="net", grown=target)
    refused(make(), tmp_path, "either all or none", *events, error=MisconfigurationException)


@pytest.mark.filterwarnings("ignore:.*WeightAveraging.*")
@pytest.mark.parametrize(
    "other",
    [overparam(), EMAWeightAveraging(), StochasticWeightAveraging(1e-2), ModelPruning("l1_unstructured", amount=0.5)],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_keep_tensors_of_the_old_shapes(other: Any, tmp_path: Path) -> None:
    match = f"does not work together with {type(other).__name__}, which keeps tensors of the weights' shapes"
    with pytest.raises(MisconfigurationException, match=match):
        trainer(tmp_path, grow(), other).fit(make())


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy"])
def test_sharding_strategies_by_name(name: str, tmp_path: Path) -> None:
    class Pretend(pl.strategies.SingleDeviceStrategy):
        pass

    Pretend.__name__ = name
    with pytest.raises(MisconfigurationException, match=f"does not work with {name}, which shards"):
        fit(make(), tmp_path, grow(), strategy=Pretend(torch.device("cpu")), accelerator="auto")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
def test_processes_that_are_copies_of_this_one(tmp_path: Path) -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    with pytest.raises(Exception, match="the module that you hold could not take the grown weights back"):
        fit(make(), tmp_path, grow(), strategy=strategy, devices=2)


def broken(*_: Any) -> Any:
    raise KeyError("mine")


class Drifting(Growable):
    """Not what it is built to be: its output depends on how often it was called."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.net(inputs) * self.calls


@pytest.mark.parametrize("case", ["optimizer_state", "gap", "weights"])
def test_an_error_at_growth_leaves_the_module_as_it_was(case: str, tmp_path: Path) -> None:
    model = seeded(Drifting) if case == "gap" else make()
    options, error = {
        "optimizer_state": ({"optimizer_state": broken}, KeyError),
        "gap": ({}, FusionError),
        "weights": ({"weights": [0.5, 0.6]}, FusionError),
    }[case]
    seen: list[Any] = []

    def look(run: pl.Trainer, module: pl.LightningModule) -> None:
        states = module.state_dict(), run.optimizers[0].state_dict(), dict(module.hparams)
        seen[:] = [*map(copy.deepcopy, states), [id(p) for p in module.parameters()]]

    run = trainer(tmp_path, grow(3, **options), Watch(look))
    with pytest.raises(error):
        run.fit(model)
    assert run.global_step == 3
    assert same_tensors(dict(model.state_dict()), dict(seen[0]))
    assert same_tensors(run.optimizers[0].state_dict(), seen[1])
    assert dict(model.hparams) == seen[2] and [id(p) for p in model.parameters()] == seen[3]
    assert model.net[0].out_features == 8
