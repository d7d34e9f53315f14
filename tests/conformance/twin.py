"""The autograd twin: a second copy of a network whose weights are made of leaf tensors inside every forward.

It shares nothing with the package but the draws, which it reads, and the tensors φ at the start, which it copies. The
graph goes through :func:`torch.func.functional_call`, because parametrizations cannot stand for tied weights, nor for
those that attention and recurrent layers read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from lightning_sop.reparam import Engine
from tests.conformance.references import Reference, out_axis


class Twin:
    """Trains ``model`` (a plain copy, made before the package saw it) with φ as leaves of the graph.

    Args:
        model: the plain copy; its own parameters are the leaves of what is not converted.
        engine: of the network under test, just expanded; φ is copied from it and the draws are read from it.
        reference: the method's equations.
    """

    def __init__(self, model: nn.Module, engine: Engine, reference: Reference) -> None:
        self.model = model
        self.engine = engine
        self.reference = reference
        self.leaves = {name: self._copy(form.phi) for name, form in engine.forms.items() if form.built}
        self._axes = {name: out_axis(model.get_submodule(name.rpartition(".")[0])) for name in self.leaves}

    def _copy(self, phi: list[nn.Parameter]) -> list[Tensor]:
        leaves = [kernel.detach().clone().requires_grad_() for kernel in phi]
        for leaf in leaves:
            leaf.register_hook(lambda grad: grad * self.reference.scale)
        return leaves

    def parameters(self) -> list[Tensor]:
        """What an optimizer holds: φ in the place of each converted weight."""
        by_weight = {id(self.model.get_parameter(name)): leaves for name, leaves in self.leaves.items()}
        return [leaf for p in self.model.parameters() for leaf in by_weight.get(id(p), [p])]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network with the weights of the present step."""
        return functional_call(self.model, self.mixed(), args, kwargs)

    def mixed(self) -> dict[str, Tensor]:
        """The weights of the present step, with their graphs."""
        mixes = {name: self.engine.forms[name].mix for name in self.leaves}
        return {name: self.reference.mixed(phi, mixes[name], self._axes[name]) for name, phi in self.leaves.items()}

    def collapsed(self) -> nn.Module:
        """A plain network with the weights to deploy."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, phi in self.leaves.items():
                model.get_parameter(name).copy_(self.reference.collapsed(phi))
        return model

    def gap(self, model: nn.Module) -> float:
        """Largest difference of φ, and of the parameters that are not converted, to the network under test."""
        pairs = [pair for name, phi in self.leaves.items() for pair in zip(phi, self.engine.forms[name].phi, strict=True)]
        for name, parameter in self.model.named_parameters():
            if name not in self.leaves and not any(parameter is self.model.get_parameter(other) for other in self.leaves):
                pairs.append((parameter, model.get_parameter(name)))
        return max(float((ours - theirs).detach().abs().max()) for ours, theirs in pairs)


OptimizerFactory = Callable[[Any], Optimizer]


def train_both(
    model: nn.Module,
    twin: Twin,
    optimizers: tuple[Optimizer, Optimizer],
    loss_at: Callable[[Any, int], Tensor],
    steps: int,
) -> list[tuple[float, float]]:
    """Train the network and its twin side by side; returns the losses of both at every step."""
    losses = []
    for step in range(steps):
        pair = []
        for network, optimizer in zip((twin, model), optimizers, strict=True):  # the twin first: our step draws anew
            loss = loss_at(network, step)
            optimizer.zero_grad()
            loss.backward()
            pair.append(float(loss.detach()))
        for optimizer in optimizers:
            optimizer.step()
        losses.append((pair[0], pair[1]))
    return losses
