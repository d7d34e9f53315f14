"""The equations of the methods, written down a second time, for autograd to differentiate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Reference(ABC):
    """How a weight is made of the tensors φ that are trained in its stead."""

    scale: float = 1.0  #: what the gradient of every φ is multiplied with

    @abstractmethod
    def mixed(self, phi: Sequence[Tensor], mix: Tensor, out_axis: int) -> Tensor:
        """The weight of a training step."""

    @abstractmethod
    def collapsed(self, phi: Sequence[Tensor]) -> Tensor:
        """The weight that is deployed."""


class ConvexMix(Reference):
    """Majority Kernels: W = Σ v_i W_i, deployed as the mean of the k kernels, gradients times ``scale`` (k by default)."""

    def __init__(self, factor: int, scale: float | None = None) -> None:
        self.factor = factor
        self.scale = factor if scale is None else scale

    def mixed(self, phi: Sequence[Tensor], mix: Tensor, out_axis: int) -> Tensor:
        kernels = torch.stack(list(phi))
        assert len(kernels) == self.factor
        mix = mix.to(kernels)
        if mix.dim() == 1:
            return torch.einsum("k,k...->...", mix, kernels)
        return torch.einsum("ko,ko...->o...", mix, kernels.movedim(out_axis + 1, 1)).movedim(0, out_axis)

    def collapsed(self, phi: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(phi)).mean(0)


def out_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight that counts its outputs."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd) or type(layer).__name__ == "Conv1D"
    return 1 if transposed else 0
