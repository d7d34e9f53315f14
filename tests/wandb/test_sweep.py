"""The sweep: W&B takes it, and every command that its agent would run builds a Trainer."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger
from wandb import wandb_agent

from lightning_sop import CollapseOnSave, DynamicsMonitor, MajorityKernels, SimulatedOverparam
from lightning_sop.cli import RunCLI, main
from tests.wandb.reading import read
from tests.wandb.server import serving

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "configs" / "sweep.yaml"
PREFIX = "trainer.callbacks.method."


@pytest.fixture(autouse=True)
def beside_the_configurations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder in which the command finds them; and what a run would leave behind in the environment."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def sweep() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SWEEP.read_text())
    return found


def combinations() -> list[dict[str, Any]]:
    """Those of a grid."""
    values = {name: choice["values"] for name, choice in sweep()["parameters"].items()}
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def command_of(chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What W&B's agent starts when the server tells it to run these parameters; nothing of its own is left."""
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        patch.setattr(wandb_agent, "AgentProcess", Process)
        patch.setattr(wandb_agent.config_util, "save_config_file_from_dict", lambda *_: None)
        agent = wandb_agent.Agent(api=None, queue=None, sweep_id="sweep1")
        agent._sweep_command = sweep()["command"]
        arguments = {name: {"value": value} for name, value in chosen.items()}
        agent._command_run({"run_id": "run1", "program": sweep()["program"], "args": arguments})
    (command,) = started
    return command


@pytest.mark.parametrize("factor", sweep()["parameters"][f"{PREFIX}factor"]["values"])
def test_every_command_builds(factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LightningCLI does, up to where it would train; in any order of the parameters."""
    built: list[LightningCLI] = []
    monkeypatch.setattr(RunCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    for chosen in (chosen for chosen in combinations() if chosen[f"{PREFIX}factor"] == factor):
        chosen = dict(sorted(chosen.items(), reverse=len(built) % 2 == 1))
        environment, program, *words = command_of(chosen, monkeypatch)
        assert (environment, program) == ("/usr/bin/env", "lightning-sop")
        monkeypatch.setattr(sys, "argv", [program, *words])
        assert main() == 0
        trainer = built[-1].trainer
        (callback,) = [found for found in trainer.callbacks if isinstance(found, SimulatedOverparam)]
        (rule,) = callback.rules
        assert isinstance(rule.method, MajorityKernels) and list(rule.exclude) == ["*.head"]
        found = {
            f"{PREFIX}factor": rule.method.factor,
            f"{PREFIX}draw": rule.method.draw_name,
            f"{PREFIX}init": rule.method.init,
        }
        assert found == chosen
        assert any(isinstance(found, DynamicsMonitor) for found in trainer.callbacks)
        assert not any(isinstance(found, CollapseOnSave) for found in trainer.callbacks)
        assert isinstance(trainer.logger, WandbLogger) and trainer.checkpoint_callback is not None
    assert len(built) == 8 and wandb.run is None


def test_one_of_them_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For two steps, to a run that tells which one it was."""
    _, program, *words = command_of(combinations()[-1], monkeypatch)
    short = [
        "max_epochs=1",
        "limit_train_batches=2",
        "limit_val_batches=1",
        "enable_progress_bar=false",
        "log_every_n_steps=1",
    ]
    monkeypatch.setattr(sys, "argv", [program, *words, *(f"--trainer.{option}" for option in short)])
    assert main() == 0
    wandb.finish()
    wandb.teardown()
    (path,) = (tmp_path / "wandb").rglob("run-*.wandb")
    written = read(path)
    assert written.tags == ["majority_kernels", "factor=8"] and {"val_loss", "kernels/spread"} <= written.names()
    method = written.config["lightning_sop"]["SimulatedOverparam"]["method"]
    assert (method["draw"], method["init"]) == ("one_hot", "independent")


@pytest.mark.filterwarnings("ignore:Read the `app_url` setting:DeprecationWarning")  # in W&B's client
def test_wandb_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client checks the parameters and sends what stands in the file."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.delenv("WANDB_MODE")
        wandb.teardown()
        assert wandb.sweep(sweep(), entity="me", project="digits") == "sweep1"
        wandb.teardown()
    (variables,) = server.variables("upsertSweep")
    assert yaml.safe_load(variables["config"]) == sweep()
    assert (variables["entityName"], variables["projectName"]) == ("me", "digits")
    assert sweep()["method"] == "grid" and sweep()["metric"] == {"name": "val_loss", "goal": "minimize"}
    assert len(combinations()) == 32
