"""What is measured: three networks with their batches, each trained plain, in our form and in the graph form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_sop.reparam import Engine, MajorityKernels, Rule, collapse_, expand_, make_plan
from lightning_sop.zoo.nets import MLP, Decoder, ResNet

FORMS = ("plain", "ours", "graph")
"""Without a training form; with :func:`lightning_sop.expand_`; with ``torch.nn.utils.parametrize``."""


@dataclass(frozen=True)
class Workload:
    """A network and the batch it is trained on.

    Attributes:
        title: network and batch in words.
        make_net: makes the network, in train mode.
        make_batch: makes inputs and targets; their values are random, which no measured quantity depends on.
        rounds: how many times each form is timed in one process.
    """

    title: str
    make_net: Callable[[], nn.Module]
    make_batch: Callable[[], tuple[Tensor, Tensor]]
    rounds: int


def _labelled(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape), torch.randint(10, shape[:1])


def _text(sequences: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(256, (sequences, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


WORKLOADS = {
    "mlp": Workload(
        "MLP 784-1024-1024-10, batch 128",
        lambda: MLP((1, 28, 28), 10, width=1024, depth=2),
        lambda: _labelled(128, 1, 28, 28),
        rounds=80,
    ),
    "resnet": Workload(
        "ResNet-20, 3x32x32, batch 64",
        lambda: ResNet((3, 32, 32), 10, width=16, blocks=3),
        lambda: _labelled(64, 3, 32, 32),
        rounds=20,
    ),
    "transformer": Workload(
        "transformer, 4 layers, d=256, 16x128 tokens",
        lambda: Decoder(256, 128, width=256, depth=4, heads=4, tied=False),
        lambda: _text(16, 128),
        rounds=12,
    ),
}


class Mix(nn.Module):
    """The graph form of Majority Kernels, for ``parametrize``: mixes the kernels inside the forward, with a fresh draw."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, *kernels: Tensor) -> Tensor:
        draw = torch.rand(self.factor, dtype=torch.float64)
        first, *rest = (draw / draw.sum()).tolist()
        mixed: Tensor = kernels[0] * first
        for share, kernel in zip(rest, kernels[1:], strict=True):
            mixed = torch.add(mixed, kernel, alpha=share)
        return mixed

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        noise = torch.randn((self.factor, *weight.shape)).to(weight)
        noise -= noise.mean(0)
        return tuple(weight + 0.1 * weight.std() * noise)


class Subject:
    """A network in one of the :data:`FORMS`, its optimizer and its batch.

    Args:
        workload: one of :data:`WORKLOADS`, by name.
        form: one of :data:`FORMS`.
        factor: number of kernels; the plain form has none.
        device: where everything lives.
        wrap: put around the network before it is trained, for example DistributedDataParallel.
    """

    def __init__(
        self,
        workload: str,
        form: str,
        factor: int = 1,
        device: str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] = lambda net: net,
    ) -> None:
        torch.manual_seed(0)
        self.form = form
        self.net = WORKLOADS[workload].make_net().to(device)
        inputs, targets = WORKLOADS[workload].make_batch()
        self.inputs, self.targets = inputs.to(device), targets.to(device)
        self.engine: Engine | None = None
        if form == "graph":
            parametrize_(self.net, factor)
        self.trained = wrap(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)
        if form == "ours":
            self.engine = expand_(self.net, self.optimizer, MajorityKernels(factor), seed=0)

    def step(self) -> None:
        """One training step, from zeroing the gradients to the update."""
        self.optimizer.zero_grad()
        logits = self._forward()
        F.cross_entropy(logits.flatten(0, -2), self.targets.flatten()).backward()
        self.optimizer.step()

    def _forward(self) -> Any:
        if self.form != "graph":
            return self.trained(self.inputs)
        with parametrize.cached():  # MultiheadAttention looks at its weight several times in one forward
            return self.trained(self.inputs)

    @torch.inference_mode()
    def evaluate(self) -> None:
        """One forward for evaluation; the network must be in eval mode."""
        self.net(self.inputs)

    def deploy(self) -> nn.Module:
        """The plain network, in eval mode."""
        return (collapse_(self.net) if self.form == "ours" else self.net).eval()


def converted_weights(net: nn.Module, factor: int) -> dict[str, Tensor]:
    """The weights that ours converts, by name; the graph form takes the same ones."""
    plan = make_plan(net, [Rule(MajorityKernels(factor))])
    return {row.name: net.get_parameter(row.name) for row, _ in plan.converted}


def parametrize_(net: nn.Module, factor: int) -> None:
    """Mix ``factor`` kernels for each of :func:`converted_weights` inside every forward, in place."""
    for name in converted_weights(net, factor):
        path, _, weight = name.rpartition(".")
        parametrize.register_parametrization(net.get_submodule(path), weight, Mix(factor))
