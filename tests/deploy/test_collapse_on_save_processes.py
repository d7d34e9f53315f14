"""CollapseOnSave and its files in other processes: without this package, and several at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deploy_toys import Toy, data, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sop.callbacks.collapse_on_save import CollapseOnSave
from lightning_sop.callbacks.simulated_overparam import SimulatedOverparam
from lightning_sop.deploy import verify
from lightning_sop.reparam import MajorityKernels

HERE = Path(__file__).parent


def overparam() -> SimulatedOverparam:
    return SimulatedOverparam(MajorityKernels(factor=3), seed=1, verbose=False)


def python(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_loads_strictly_where_lightning_sop_is_not_installed(tmp_path):
    net = Toy(width=7)
    trainer(tmp_path, overparam(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename="x")).fit(net, data())
    script = (
        "import sys, torch\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'lightning_sop': raise ImportError('blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from deploy_toys import Toy\n"
        "model = Toy.load_from_checkpoint(sys.argv[1])\n"
        "assert not any(name.startswith('lightning_sop') for name in sys.modules)\n"
        "torch.save(model.eval()(torch.ones(2, 4)), sys.argv[2])\n"
    )
    python(script, tmp_path / "x.deploy.ckpt", tmp_path / "outputs")
    torch.testing.assert_close(torch.load(tmp_path / "outputs"), net.eval()(torch.ones(2, 4)))


def test_deploy_needs_no_lightning():
    python("import sys, lightning_sop.deploy\nassert not any(name.startswith('lightning.') for name in sys.modules)")


DDP = """
import os, sys
from deploy_toys import Kernels, Toy, data, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_sop.callbacks.collapse_on_save import CollapseOnSave

class Noted(CollapseOnSave):
    def prepare(self, checkpoint, path):
        job = super().prepare(checkpoint, path)
        if job is not None:
            with open(os.path.join(sys.argv[1], "writers"), "a") as log:
                log.write(str(self._trainer.global_rank))
        return job

if __name__ == "__main__":
    saves = ModelCheckpoint(sys.argv[1], filename="x", save_last="link")
    run = trainer(sys.argv[1], Kernels(), Noted(), saves, devices=2, strategy=sys.argv[2])
    run.fit(Toy(), data(), data())
"""


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork", "ddp_spawn"])
def test_two_processes_have_one_writer(tmp_path, strategy):
    script = tmp_path / "run.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{DDP}")
    folder = tmp_path / "out"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder), strategy],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "writers").read_text() == "0"
    assert {p.name for p in folder.iterdir() if p.suffix == ".ckpt"} == {
        "x.ckpt",
        "x.deploy.ckpt",
        "last.ckpt",
        "last.deploy.ckpt",
    }
    receipt = verify(folder / "x.deploy.ckpt")
    # The step itself is the wrapper's forward under DDP: the recorded call is the model's own all the same.
    assert receipt["probe"] == [{"module": "", "shapes": [[4, 4]]}]
    assert receipt["output_difference"] == 0
