"""What gradients are worth: measured by the steps that an optimizer makes of them, and by whether these do anything new."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sop.deploy.replay import Call, few_samples, tensors_in
from lightning_sop.growth.backward_error import dot_products
from lightning_sop.growth.probe import answer
from lightning_sop.growth.trap import trap

Sizes = Mapping[str, Tensor | float]
_TRAP_VALUES = 2**25  # of the trap test's least-squares problem
_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")


def _held(optimizers: Sequence[Optimizer]) -> Iterator[tuple[Tensor, Mapping[str, Any], Mapping[str, Any]]]:
    """Every parameter with its group's options and its state."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, group, optimizer.state.get(parameter, {})


def step_sizes(
    optimizers: Sequence[Optimizer], network: nn.Module, factors: Mapping[str, float]
) -> dict[str, Tensor | float]:
    """By what an optimizer multiplies a gradient: the learning rate, over the root of the second moment where it has one.

    With these sizes h D a step lowers the loss by gᵀ(hD)g at first order; momentum, a factor common to all, is left out.

    Args:
        optimizers: of the network.
        network: the network.
        factors: of single learning rates by name.

    Returns:
        By name, one number or one for each value; parameters that no optimizer holds have 0.
    """
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    sizes: dict[str, Tensor | float] = dict.fromkeys(names.values(), 0.0)
    for parameter, group, state in _held(optimizers):
        name = names.get(id(parameter))
        if name is None:
            continue
        rate = float(group.get("lr", 1.0)) * factors.get(name, 1.0)
        key = next((key for key in (*_SECOND_MOMENTS, "exp_inf") if isinstance(state.get(key), Tensor)), None)
        if key is None or state[key].shape != parameter.shape:
            sizes[name] = rate
            continue
        moment = state[key].detach().float()
        if key == "exp_avg_sq" and "betas" in group and "step" in state:
            moment = moment / (1 - float(group["betas"][1]) ** max(1.0, float(state["step"])))
        root = moment if key == "exp_inf" else moment.sqrt()
        sizes[name] = rate / (root + group.get("eps", 1e-8))
    return sizes


def mean_rate(optimizers: Sequence[Optimizer], network: nn.Module, factors: Mapping[str, float]) -> float:
    """The learning rate, the mean over all values where groups differ."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    rates = [
        (float(group.get("lr", 1.0)) * factors.get(names[id(parameter)], 1.0), parameter.numel())
        for parameter, group, _ in _held(optimizers)
        if id(parameter) in names
    ]
    if len({rate for rate, _ in rates}) <= 1:
        return rates[0][0] if rates else 0.0
    return sum(rate * count for rate, count in rates) / sum(count for _, count in rates)


def products(gradients: Sequence[Mapping[str, Tensor]], sizes: Sizes) -> Tensor:
    """g_iᵀ S g_j of K gradients, S diagonal: (K, K) float64 on the CPU; names without a size count as zero."""
    roots = {name: size**0.5 for name, size in sizes.items()}
    return dot_products([{name: t * roots[name] for name, t in gradient.items() if name in roots} for gradient in gradients])


def products_of_sources(pulled: Sequence[Sequence[Mapping[str, Tensor]]], sizes: Sizes) -> Tensor:
    """The same for gradients by batch and by source, summed over sources; for those of other shapes with mean sizes."""
    total = torch.zeros(len(pulled), len(pulled), dtype=torch.float64)
    for source in range(len(pulled[0])):
        gradients = [batch[source] for batch in pulled]
        fitting = {name: _fitting(sizes[name], tensor) for name, tensor in gradients[0].items() if name in sizes}
        total += products(gradients, fitting)
    return total


def mean_of(gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of gradients with the same names."""
    return {name: torch.stack([gradient[name] for gradient in gradients]).mean(0) for name in gradients[0]}


def trap_within(
    grown: nn.Module,
    gradient: Mapping[str, Tensor],
    sources: Sequence[nn.Module],
    pulled: Sequence[Mapping[str, Tensor]],
    calls: Sequence[Call],
) -> float:
    """:func:`~lightning_sop.growth.trap.trap`, on fewer samples or not at all where it would need much memory.

    Returns:
        1 - R²; NaN also where an operation has no forward derivative, or the outputs are too few.
    """
    tensors = sum(len(gradient) for gradient in pulled)
    for some in (list(calls), [few_samples(call) or call for call in calls]):
        if sum(tensor.numel() for tensor in tensors_in(answer(sources[0], some))) * tensors <= _TRAP_VALUES:
            with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
                return trap(grown, gradient, sources, pulled, some)
            break
    return math.nan


def _fitting(size: Tensor | float, tensor: Tensor) -> Tensor | float:
    return size if isinstance(size, float) or size.shape == tensor.shape else float(size.mean())
