"""The symmetry trap: whether a grown network's next step does anything that the small ones could not do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sop.deploy.replay import Call, tensors_in
from lightning_sop.growth.fuse import as_calls
from lightning_sop.growth.probe import answer

State = Mapping[str, Tensor]


def trap(
    grown: nn.Module,
    grown_gradient: State,
    small: Sequence[nn.Module],
    small_gradients: Sequence[State],
    probe: Any,
) -> float:
    """The part of a grown network's next move that the small ones cannot make: 1 - R² in [0, 1], 0 for duplications.

    To first order a step along -g moves the outputs by -J g, with their Jacobian J. The grown network's move is fitted by
    least squares with the moves of each tensor of each small network by itself. Duplicating the units of an MLP or of a
    convolutional network gives 0, however the copies are weighted and however large the new part of the gradient is: with
    copies alone a network can do nothing new before they have become different. So it is with equally weighted copies in any
    network. Copies of unequal weight under a LayerNorm that they share give slightly more than 0, because their difference
    passes it without being normalized. (Derived for this package; the growth is that of Deep Fusion, arXiv 2306.11903.)

    Args:
        grown: the grown network; not modified.
        grown_gradient: its gradient.
        small: the networks that it was made of; not modified.
        small_gradients: their gradients, one mapping each.
        probe: inputs as for :func:`~lightning_sop.growth.fuse.fuse`; the networks answer in evaluation mode. The outputs
            should have many times as many values as the small networks have tensors.

    Returns:
        1 - R²; NaN where a gradient or an output is not finite.

    Raises:
        ValueError: the outputs have no more values than the small networks have tensors, so that any move would fit, or the
            grown network's outputs are of other shapes.
    """
    calls = as_calls(probe)
    move = _move(grown, grown_gradient, calls)
    columns = []
    for network, gradient in zip(small, small_gradients, strict=True):
        columns += [_move(network, {name: tensor}, calls) for name, tensor in gradient.items()]
    if any(column.shape != move.shape for column in columns):
        raise ValueError("trap: the outputs of the small networks and of the grown one differ in shape")
    if len(move) <= len(columns):
        raise ValueError(f"trap: {len(move)} output values are too few for {len(columns)} tensors; probe with more inputs")
    columns = [column / column.norm() for column in columns if bool(column.any())]
    if not bool(move.any()) or not columns:
        return float(bool(move.any()))
    basis = torch.stack(columns, 1)
    if not bool(move.isfinite().all() and basis.isfinite().all()):
        return math.nan
    # By singular values: the moves of different tensors may be proportional to each other.
    fit = torch.linalg.lstsq(basis, move.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return float((move - basis @ fit).square().sum() / move.square().sum())


class _Answers(nn.Module):
    """A network as a function of the calls that it answers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, calls: list[Call]) -> tuple[Tensor, ...]:
        return tuple(t for t in tensors_in(answer(self.network, calls)) if t.is_floating_point())


def _move(network: nn.Module, direction: State, calls: list[Call]) -> Tensor:
    """J times a direction: (n,) float64 on the CPU, n the number of values in all outputs."""
    tensors = {f"network.{name}": network.get_parameter(name).detach() for name in direction}
    tangents = {f"network.{name}": tensor.detach() for name, tensor in direction.items()}
    function = _Answers(network)

    def outputs(values: State) -> Any:
        return torch.func.functional_call(function, dict(values), (calls,))

    with _forward_differentiable(network):
        changes = torch.func.jvp(outputs, (tensors,), (tangents,))[1]
    return torch.cat([change.reshape(-1).cpu().double() for change in changes])


@contextmanager
def _forward_differentiable(network: nn.Module) -> Iterator[None]:
    """Without the kernels of attention and of RNNs that have no forward derivative."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in network.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # flags() of oneDNN warns where there is no Intel GPU
            before = torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
            stack.callback(torch.backends.mkldnn.set_flags, before[0])
        yield
