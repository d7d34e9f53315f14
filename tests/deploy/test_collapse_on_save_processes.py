"""CollapseOnSave and its files in other processes: without this package, and several at once."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from deploy_toys import CompiledInside, Kernels, Toy, data, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_sop.callbacks.collapse_on_save import CollapseOnSave
from lightning_sop.callbacks.simulated_overparam import SimulatedOverparam
from lightning_sop.deploy import verify
from lightning_sop.reparam import MajorityKernels

HERE = Path(__file__).parent

two_processes = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:.*sync_dist.*", "ignore:Be aware that when using"
)


def overparam() -> SimulatedOverparam:
    return SimulatedOverparam(MajorityKernels(factor=3), seed=1, verbose=False)


def python(script: str | Path, *arguments: object) -> str:
    how = [str(script)] if isinstance(script, Path) else ["-c", script]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *how, *map(str, arguments)],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


READER = """
import sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'lightning_sop': raise ImportError('blocked')
sys.meta_path.insert(0, Block())
import deploy_toys
for name, kind in [('plain', 'Toy'), ('outside', 'Toy'), ('inside', 'CompiledInside')]:
    model = getattr(deploy_toys, kind).load_from_checkpoint(f'{sys.argv[1]}/{name}.deploy.ckpt')
    torch.save(model.eval()(torch.ones(2, 4)), f'{sys.argv[1]}/{name}.pt')
assert not any(name.startswith('lightning_sop') for name in sys.modules)
"""


def test_loads_strictly_where_lightning_sop_is_not_installed(tmp_path):
    nets = {"plain": Toy(width=7), "outside": Toy(), "inside": CompiledInside()}
    nets["outside"].net = torch.compile(nets["outside"].net, backend="eager")
    for name, net in nets.items():
        trainer(tmp_path, overparam(), CollapseOnSave(), ModelCheckpoint(tmp_path, filename=name)).fit(net, data())
    python(READER, tmp_path)
    for name, net in nets.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), net.eval()(torch.ones(2, 4)))


def test_deploy_needs_no_lightning():
    python("import sys, lightning_sop.deploy\nassert not any(name.startswith('lightning.') for name in sys.modules)")


class Noted(CollapseOnSave):
    """Every process that writes leaves its rank."""

    def prepare(self, checkpoint, path):
        job = super().prepare(checkpoint, path)
        if job is not None:
            with open(os.path.join(os.path.dirname(path), "writers"), "a") as log:
                log.write(str(self._trainer.global_rank))
        return job


class Leave(Callback):
    """Ends gloo's threads, which may abort a process that exits while they run."""

    def teardown(self, trainer, pl_module, stage):
        dist.barrier()
        dist.destroy_process_group()


def fit_in_two_processes(folder, strategy, model=None):
    saves = ModelCheckpoint(folder, filename="x", save_last="link")
    run = trainer(folder, Kernels(), Noted(), saves, Leave(), devices=2, strategy=strategy)
    run.fit(Toy() if model is None else model, data(), data())


SCRIPT = """
import sys
from test_collapse_on_save_processes import fit_in_two_processes
fit_in_two_processes(*sys.argv[1:])
"""


@two_processes
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork", "ddp_spawn"])
def test_two_processes_have_one_writer(tmp_path, strategy):
    if strategy == "ddp":
        script = tmp_path / "run.py"  # a file: the launcher starts it once more
        script.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{SCRIPT}")
        python(script, tmp_path, strategy)
    else:
        fit_in_two_processes(tmp_path, strategy)
    assert (tmp_path / "writers").read_text() == "0"
    assert {p.name for p in tmp_path.iterdir() if p.suffix == ".ckpt"} == {
        "x.ckpt",
        "x.deploy.ckpt",
        "last.ckpt",
        "last.deploy.ckpt",
    }
    receipt = verify(tmp_path / "x.deploy.ckpt")
    # The step itself is the wrapper's forward under DDP: the recorded call is the model's own all the same.
    assert receipt["probe"] == [{"module": "", "shapes": [[4, 4]]}]
    assert receipt["output_difference"] == 0


class AsksTheOthers(Toy):
    """Its forward takes part in a collective, in training and in evaluation."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return super().forward(x) + 0 * COLLECTIVES[self.how](x.detach().clone())


def gathered(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return sum(parts).mean()


def gathered_objects(x):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, float(x.mean()))
    return sum(parts)


COLLECTIVES = {
    "tensors": gathered,
    "objects": gathered_objects,
    "functional": lambda x: functional.all_reduce(x, "sum", dist.group.WORLD).mean(),
    "barrier": lambda x: dist.barrier() or 0,
}


@two_processes
@pytest.mark.parametrize("how", list(COLLECTIVES))
def test_a_save_waits_for_no_other_process(tmp_path, how):
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=30))
    fit_in_two_processes(tmp_path, strategy, AsksTheOthers(how))
    receipt = verify(tmp_path / "x.deploy.ckpt")
    assert (receipt["output_difference"], receipt["weight_difference"]) == (None, 0)
    assert "forward could not be replayed" in receipt["note"] and "waits for other processes" in receipt["note"]
