"""Bad input gets an error that names what is wrong and the way out, before training starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lightning_sop import MajorityKernels, Rule, SimulatedOverparam
from tests.callbacks.helpers import Classifier, fit, overparam, seeded


@pytest.mark.parametrize("factor", [0, -1, 2.5, "4", True, None])
def test_wrong_factor(factor: Any) -> None:
    with pytest.raises(ValueError, match="factor must be a whole number"):
        MajorityKernels(factor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["encoder.*"]}, r"include pattern 'encoder\.\*' matches no parameter.*net\.0\.weight"),
        ({"exclude": ["*.heads"]}, r"exclude pattern '\*\.heads' matches no parameter"),
        ({"layers": ["Conv2d"]}, "the layer type .Conv2d. matches no layer"),
        ({"include": ["net.1"]}, "layer type BatchNorm1d is not asked for"),
        ({"exclude": ["net"]}, "excluded by 'net'"),
    ],
)
def test_nothing_matches(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit(seeded(Classifier), tmp_path, overparam(3, **options))


def test_a_string_for_a_list() -> None:
    with pytest.raises(ValueError, match=r"exclude takes a list of strings.*\['head'\]"):
        SimulatedOverparam(exclude="head")


def test_rules_or_arguments() -> None:
    with pytest.raises(ValueError, match="either rules, or method"):
        SimulatedOverparam(MajorityKernels(2), rules=[Rule(MajorityKernels(3))])
    with pytest.raises(ValueError, match="rules is empty"):
        SimulatedOverparam(rules=[])


def test_negative_batchnorm_batches() -> None:
    with pytest.raises(ValueError, match="reestimate_batchnorm is a number of training batches"):
        SimulatedOverparam(reestimate_batchnorm=-1)


def test_pruned_in_mid_training(tmp_path: Path) -> None:
    class Prune(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            torch.nn.utils.prune.l1_unstructured(pl_module.net[0], "weight", 0.5)

    with pytest.raises(RuntimeError, match=r"net\.0\.weight is no longer a parameter of its layer"):
        fit(seeded(Classifier), tmp_path, overparam(3), Prune())


def test_an_optimizer_without_step_hooks(tmp_path: Path) -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            self.param_groups = [{"params": list(params), "lr": 1e-2}]
            self.state: dict[Any, Any] = {}
            self.defaults: dict[str, Any] = {}

        def step(self, closure: Any = None) -> None:
            closure()

    class Model(Classifier):
        def configure_optimizers(self) -> Any:
            return Own(self.parameters())

    with pytest.raises(TypeError, match=r"Own\.step does not run torch's optimizer step hooks"):
        fit(seeded(Model), tmp_path, overparam(3))


def test_monitors_and_gradient_norms_log_the_plain_network(tmp_path: Path) -> None:
    class Norms(Classifier):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.log_dict(pl.utilities.grad_norm(self, norm_type=2))

    logged = []
    for callbacks in ([], [overparam(1)]):
        logger = CSVLogger(tmp_path, name=f"run{len(logged)}")
        run = fit(seeded(Norms), tmp_path, *callbacks, LearningRateMonitor(), logger=logger, log_every_n_steps=1)
        logged.append((sorted(run.logged_metrics), [float(v) for _, v in sorted(run.logged_metrics.items())]))
    assert logged[0] == logged[1]
    assert "grad_2.0_norm/net.0.weight" in logged[0][0]
