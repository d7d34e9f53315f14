"""Resuming from a checkpoint is the uninterrupted run, bit for bit; plain and over-parametrized runs take each other's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

from lightning_sop import MajorityKernels, SimulatedOverparam
from tests.callbacks.helpers import Classifier, Manual, fit, overparam, same_tensors, seeded

# Lightning's advice to resume with the same callbacks, which is what some of these tests do not do.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using")


def make(optimizer: str = "adamw") -> Classifier:
    """Without dropout and shuffling: Lightning does not save the global random state."""
    return seeded(Classifier, optimizer, shuffle=False, dropout=0.0)


def make_manual() -> Manual:
    model = seeded(Manual)
    model.net[3].p = 0.0
    model.hparams["shuffle"] = False
    return model


def every_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


CASES: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "adamw": (make, [], {}),
    "sgd": (lambda: make("sgd"), [], {}),
    "lbfgs": (lambda: make("lbfgs"), [], {}),
    "accumulation": (make, [], {"accumulate_grad_batches": 3}),
    "clipping": (make, [], {"gradient_clip_val": 0.05}),
    "manual": (make_manual, [], {}),
    "bf16-true": (make, [], {"precision": "bf16-true"}),
    "ema": (make, [EMAWeightAveraging(decay=0.9)], {}),
}


@pytest.mark.filterwarnings("ignore:.*EMAWeightAveraging.*")
@pytest.mark.parametrize("case", CASES)
def test_resume_is_bitwise(case: str, tmp_path: Path) -> None:
    build, callbacks, options = CASES[case]
    full, resumed = build(), build()
    mine = [overparam(4), *callbacks, every_epoch(tmp_path)]
    whole = fit(full, tmp_path, *mine, max_epochs=4, **options)
    with torch.no_grad():  # what the file does not restore would show
        for parameter in resumed.parameters():
            parameter.add_(1)
    part = fit(resumed, tmp_path / "again", *mine, max_epochs=4, ckpt=tmp_path / "epoch=1.ckpt", **options)
    assert resumed.losses == full.losses[len(full.losses) // 2 :]
    assert same_tensors(dict(resumed.state_dict()), dict(full.state_dict()))
    ours, theirs = part.callbacks[0], whole.callbacks[0]
    assert isinstance(ours, SimulatedOverparam)
    assert same_tensors(ours.state_dict(), theirs.state_dict())
    for left, right in zip(part.optimizers, whole.optimizers, strict=True):
        assert same_tensors(left.state_dict(), right.state_dict())


class Breaks(Callback):
    """Fails in one hook of one batch, and saves then."""

    def __init__(self, hook: str, step: int, path: Path) -> None:
        self.step, self.path = step, path
        setattr(self, hook, self.fail)

    def fail(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("broken")

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward", "on_train_batch_end"])
def test_a_batch_that_is_begun_again_is_not_counted_twice(hook: str, tmp_path: Path) -> None:
    """The mix is annealed as in the whole run, whose data Lightning does not go on with within an epoch."""
    full, broken, resumed, path = make(), make(), make(), tmp_path / "broken.ckpt"
    progress: dict[bool, list[float]] = {False: [], True: []}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            engine = next(c for c in trainer.callbacks if isinstance(c, SimulatedOverparam)).engine
            progress[pl_module is not full].append(engine.progress)

    fit(full, tmp_path, overparam(4), Look(), max_epochs=3)
    with pytest.raises(RuntimeError, match="broken"):
        fit(broken, tmp_path, overparam(4), Look(), Breaks(hook, 6, path), max_epochs=3)
    fit(resumed, tmp_path, overparam(4), Look(), max_epochs=3, ckpt=str(path))
    assert progress[False] == progress[True] == [step / 12 for step in range(12)]


def test_a_resumed_run_mixes_on(tmp_path: Path) -> None:
    fit(make(), tmp_path, overparam(4), every_epoch(tmp_path), max_epochs=2)
    run = fit(make(), tmp_path, overparam(4), max_epochs=3, ckpt=tmp_path / "epoch=1.ckpt")
    kernels = run.callbacks[0].state_dict()["forms"]["net.0.weight"]["storage"][0]
    assert kernels.shape == (4, 32, 10)
    assert (kernels[0] - kernels[1]).abs().max() > 0.01


def test_after_a_kill(tmp_path: Path) -> None:
    """A process killed without warning resumes from ``last`` as if nothing had been."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {os.getcwd()!r})
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tests.callbacks.helpers import fit, overparam
from tests.callbacks.test_resume import make
class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
fit(make(), {str(tmp_path)!r}, overparam(3), ModelCheckpoint({str(tmp_path)!r}, save_last=True), Kill(), max_epochs=4)
"""
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    full, resumed = make(), make()
    fit(full, tmp_path, overparam(3), max_epochs=4)
    fit(resumed, tmp_path, overparam(3), max_epochs=4, ckpt=tmp_path / "last.ckpt")
    assert resumed.losses == full.losses[-len(resumed.losses) :]
    assert 0 < len(resumed.losses) < len(full.losses)
    assert same_tensors(dict(resumed.state_dict()), dict(full.state_dict()))


def test_our_checkpoint_resumes_without_us(tmp_path: Path) -> None:
    ours = make()
    fit(ours, tmp_path, overparam(4), every_epoch(tmp_path))
    plain = make()
    run = fit(plain, tmp_path, max_epochs=3, ckpt=tmp_path / "epoch=1.ckpt")
    assert run.global_step == 12
    assert len(run.optimizers[0].state_dict()["state"]) == len(list(plain.parameters()))
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(plain.state_dict())
    steps = {float(entry["step"]) for entry in saved["optimizer_states"][0]["state"].values()}
    assert steps == {8.0}


def test_plain_checkpoint_resumes_with_us(tmp_path: Path) -> None:
    plain = make()
    fit(plain, tmp_path, every_epoch(tmp_path))
    ours = make()
    run = fit(ours, tmp_path, overparam(4), max_epochs=3, ckpt=tmp_path / "epoch=1.ckpt")
    assert run.global_step == 12
    assert ours.losses[0] < plain.losses[0]  # it begins where the plain run had come to
    moments = run.callbacks[0].state_dict()["moments"][0]["net.0.weight"]
    assert [float(state["step"]) for state in moments] == [12.0] * 4  # and its optimizer, too


def test_factor_one_continues_a_plain_checkpoint_bitwise(tmp_path: Path) -> None:
    full, part = make(), make()
    fit(full, tmp_path, every_epoch(tmp_path), max_epochs=3)
    fit(part, tmp_path, overparam(1), max_epochs=3, ckpt=tmp_path / "epoch=1.ckpt")
    assert part.losses == full.losses[8:]
    assert same_tensors(dict(part.state_dict()), dict(full.state_dict()))


def test_weights_only_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It holds the deployable weights; Lightning itself cannot resume from it, and says so."""
    model = make()
    fit(model, tmp_path, overparam(4), ModelCheckpoint(tmp_path, filename="w", save_weights_only=True))
    saved = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert same_tensors(dict(saved["state_dict"]), dict(model.state_dict()))
    with caplog.at_level("INFO"), pytest.raises(KeyError, match="only the model"):
        fit(make(), tmp_path, overparam(4), ckpt=tmp_path / "w.ckpt", max_epochs=3)
    assert "Model.load_from_checkpoint(path), then fit without ckpt_path" in caplog.text
    again = Classifier.load_from_checkpoint(tmp_path / "w.ckpt")
    fit(again, tmp_path, SimulatedOverparam(MajorityKernels(4, init="spread"), verbose=False))


def test_other_factor_is_refused(tmp_path: Path) -> None:
    fit(make(), tmp_path, overparam(4), every_epoch(tmp_path))
    with pytest.raises(ValueError, match=r"'net.0.weight' as MajorityKernels \{'factor': 4\}.*this run as.*'factor': 3"):
        fit(make(), tmp_path, overparam(3), ckpt=tmp_path / "epoch=1.ckpt", max_epochs=3)


def test_other_selection_is_refused(tmp_path: Path) -> None:
    fit(make(), tmp_path, overparam(4), every_epoch(tmp_path))
    with pytest.raises(ValueError, match="was trained with SimulatedOverparam"):
        fit(make(), tmp_path, overparam(4, exclude=["net.4"]), ckpt=tmp_path / "epoch=1.ckpt", max_epochs=3)


def test_other_model_is_refused(tmp_path: Path) -> None:
    fit(make(), tmp_path, overparam(4), every_epoch(tmp_path))

    class Other(Classifier):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__(shuffle=False)
            self.net = torch.nn.Sequential(torch.nn.Linear(10, 5))

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return None

    with pytest.raises(ValueError, match="net.0.weight.*shape|net.4.weight"):
        fit(Other(), tmp_path, overparam(4), ckpt=tmp_path / "epoch=1.ckpt", max_epochs=3)


def test_state_is_plain_data(tmp_path: Path) -> None:
    fit(make(), tmp_path, overparam(4), every_epoch(tmp_path))
    states = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert any(key.startswith("SimulatedOverparam") for key in states)
