"""BatchNorm statistics estimated anew for the collapsed weights, against torch's own update_bn."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from tests.callbacks.helpers import Classifier, fit, overparam, same_tensors, seeded

BATCHES = 3  # an epoch has 4


class Ordered(Classifier):
    """Its batches come in the same order each epoch; without dropout, so that update_bn can be the reference."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"shuffle": False, "dropout": 0.0, **options})


class Part(Ordered):
    """Its step calls the network, not the module."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class InContainers(Ordered):
    """Its network is in containers that are never called, torch's and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        own = nn.Module()
        own.network = self.net
        del self.net
        self.parts = nn.ModuleDict({"nets": nn.ModuleList([own])})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.parts["nets"][0].network(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.parts["nets"][0].network(batch[0]), batch[1])


class Keywords(Ordered):
    """Calls itself with keyword arguments, and changes its inputs in place."""

    def forward(self, inputs: Tensor, *, scale: Tensor | None = None) -> Tensor:
        return self.net(inputs.mul_(2.0 if scale is None else scale))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(scale=torch.tensor(2.0), inputs=batch[0].clone()), batch[1])


class ByHand(Ordered):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Together(nn.BatchNorm1d):
    """Stands in for SyncBatchNorm, which is for accelerators only: statistics of the batches of all processes."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super().forward(inputs)
        shares = [torch.empty_like(inputs) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, inputs.detach())
        shares[dist.get_rank()] = inputs
        return super().forward(torch.cat(shares)).chunk(len(shares))[dist.get_rank()]


class Synchronized(Ordered):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = Together(32)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name}


def reference(model: type[Classifier], state: dict[str, Tensor], inputs: Any) -> dict[str, Tensor]:
    """What update_bn makes of these weights and inputs, in a model of its own."""
    with torch.random.fork_rng():
        twin = model()
        twin.load_state_dict(state)
        with torch.no_grad():
            update_bn(inputs, twin)
    return statistics(twin)


class Compare(Callback):
    """Compares with the reference whenever the statistics are to be there, and leaves a file for each comparison."""

    def __init__(self, folder: Path, validated: bool = True) -> None:
        self.folder, self.validated = str(folder), validated
        self.recent: deque[Tensor] = deque(maxlen=BATCHES)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.recent.append(batch[0].clone())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.recent:
            self.compare(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.validated:
            self.compare(trainer, pl_module)

    def compare(self, trainer: pl.Trainer, pl_module: Any) -> None:
        expected = reference(type(pl_module), pl_module.state_dict(), [inputs.clone() for inputs in self.recent])
        assert same_tensors(statistics(pl_module), expected)
        Path(self.folder, f"compared-{trainer.global_rank}-{trainer.global_step}").touch()


def compared(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("compared-*"))


@pytest.mark.parametrize("model", [Ordered, Part, InContainers, Keywords, ByHand])
def test_statistics_are_those_of_update_bn(model: type[Ordered], tmp_path: Path) -> None:
    fit(seeded(model), tmp_path, overparam(3, reestimate_batchnorm=BATCHES), Compare(tmp_path))
    assert compared(tmp_path) == ["compared-0-4", "compared-0-8"]


def test_without_validation_they_are_there_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    callbacks = [overparam(3, reestimate_batchnorm=BATCHES), Compare(tmp_path, validated=False)]
    fit(seeded(Ordered), tmp_path, *callbacks, limit_val_batches=0)
    assert compared(tmp_path) == ["compared-0-4", "compared-0-8"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*sync_dist.*")
@pytest.mark.parametrize("model", [Ordered, Part, ByHand, Synchronized])
def test_two_processes(model: type[Ordered], tmp_path: Path) -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    callbacks = [overparam(3, reestimate_batchnorm=BATCHES), Compare(tmp_path)]
    fit(seeded(model), tmp_path, *callbacks, devices=2, strategy=strategy)
    assert compared(tmp_path) == [f"compared-{rank}-{step}" for rank in (0, 1) for step in (2, 4)]


class Trace(Callback):
    """Everything that must be the same bits with and without."""

    def __init__(self, trace: list[Any]) -> None:
        self.trace = trace

    def __deepcopy__(self, memo: dict[int, Any]) -> Trace:
        return self

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        state = pl_module.state_dict()
        self.trace.append({name: value.clone() for name, value in state.items() if "running" not in name})
        self.trace.append([torch.get_rng_state(), pl_module.losses[-1], *(m.training for m in pl_module.modules())])


def test_the_training_is_the_same_bits_without_it(tmp_path: Path) -> None:
    traces: list[list[Any]] = [[], []]
    for batches, trace in zip((0, BATCHES), traces, strict=True):
        saves = ModelCheckpoint(tmp_path / str(batches), every_n_train_steps=3)
        fit(seeded(Classifier), tmp_path, overparam(3, reestimate_batchnorm=batches), Trace(trace), saves)
    assert len(traces[0]) == 16
    assert same_tensors(*traces)


@pytest.mark.parametrize(
    ("options", "validation"),
    [
        ({"save_on_train_epoch_end": False}, 1.0),
        ({"save_on_train_epoch_end": True}, 1.0),
        ({"save_on_train_epoch_end": True}, 0),
        ({"every_n_train_steps": 2}, 1.0),
    ],
    ids=["validation end", "epoch end", "no validation", "every two steps"],
)
def test_checkpoints_have_them(options: dict[str, Any], validation: float, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **options)
    model = seeded(Ordered)
    fit(model, tmp_path, overparam(3, reestimate_batchnorm=BATCHES), saves, limit_val_batches=validation)
    inputs = [batch[0] for batch in model.train_dataloader()] * 2
    files = {int(path.stem.removeprefix("step=")): path for path in tmp_path.glob("step=*.ckpt")}
    assert sorted(files) == ([2, 4, 6, 8] if "every_n_train_steps" in options else [4, 8])
    for step, path in files.items():
        state = torch.load(path, weights_only=True)["state_dict"]
        found = {name: value for name, value in state.items() if "running" in name}
        assert same_tensors(found, reference(Ordered, state, inputs[max(0, step - BATCHES) : step]))


class Direct(Ordered):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.norm(batch[0])), batch[1])


def test_a_layer_called_by_the_step_itself(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the training step calls the BatchNorm layer 'norm' by itself.*batchnorm=0"):
        fit(seeded(Direct), tmp_path, overparam(3, reestimate_batchnorm=BATCHES))


class Odd(Ordered):
    def forward(self, inputs: Any) -> Tensor:
        return self.net(next(iter(inputs)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(x for x in batch[:1]), batch[1])


def test_inputs_that_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"inputs of forward cannot be copied and kept \(TypeError.*batchnorm=0"):
        fit(seeded(Odd), tmp_path, overparam(3, reestimate_batchnorm=BATCHES), limit_val_batches=0)


# ---------------------------------------------------------------------- torch.compile


class Quiet(Ordered):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_compiled_network_is_not_compiled_again(tmp_path: Path) -> None:
    frames = []
    for batches in (0, BATCHES):
        torch._dynamo.reset()
        counter, model = CompileCounter(), seeded(Quiet)
        model.net = torch.compile(model.net, backend=counter, fullgraph=True)
        fit(model, tmp_path, overparam(3, reestimate_batchnorm=batches), max_epochs=3)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] > 0
    inputs = [batch[0] for batch in model.train_dataloader()][-BATCHES:]
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    expected = reference(Quiet, state, inputs)
    assert same_tensors(list(statistics(model).values()), list(expected.values()))


def test_a_step_that_is_one_graph_shows_no_inputs(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = torch.compile(seeded(Quiet), backend=CompileCounter())
    with pytest.warns(UserWarning, match="no call of a network with BatchNorm layers was seen"):
        fit(model, tmp_path, overparam(3, reestimate_batchnorm=BATCHES), limit_val_batches=0)


def test_what_a_module_remembers_between_calls_is_left_alone(tmp_path: Path) -> None:
    class Remembers(Classifier):
        """Adds something of its last outputs."""

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            outputs = self.net(inputs) + 0.1 * getattr(self, "last", torch.zeros(5)).mean(0)
            self.last = outputs.detach()
            return outputs

    trained = []
    for batches in (0, 2):
        model = seeded(Remembers)
        fit(model, tmp_path, overparam(3, reestimate_batchnorm=batches), limit_val_batches=0)
        trained.append((dict(model.named_parameters()), model.calls))
    assert same_tensors(*trained)
