"""A weight of three numbers, its losses, and expectations over the package's own mixes, as sums over all their permutations.

A set of mixes that holds every permutation of each has the moments of an exchangeable distribution exactly. H is the Hessian
of the loss in the weight, D_i = W_i - M the deviations of the kernels, S = Σ D_i D_i', v a mix, s the gradient scale, h the
learning rate, A = k E|v|^2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.func import grad

from lightning_sop import MajorityKernels
from lightning_sop.reparam import Site
from lightning_sop.reparam.majority import Draw

K, SIZE = 3, 3
SITE = Site("weight", (SIZE,))
DRAWS = pytest.mark.parametrize("draw", get_args(Draw))
Loss = Callable[[Tensor], Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HESSIAN = torch.tensor([[2.0, 0.5, 0.0], [0.5, 3.0, -0.8], [0.0, -0.8, 4.0]], dtype=torch.float64)
SLOPE = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)


def quadratic(w: Tensor) -> Tensor:
    return w @ SLOPE + ((w @ HESSIAN) * w).sum(-1) / 2


def curved(w: Tensor) -> Tensor:
    """A loss with derivatives of every order."""
    return (numbers(8, SIZE, seed=2) @ w - numbers(8, seed=3)).cosh().log().mean()


def drawn(draw: str, count: int, k: int = K) -> Tensor:
    """So many independent mixes, of shape ``(count, k)``."""
    method = MajorityKernels(k, draw, granularity="out_channel")
    (mixes,) = method.draw([Site("weight", (count, 1))], torch.Generator().manual_seed(0), 0.0)
    return mixes.T


def exchangeable(draw: str, k: int = K) -> Tensor:
    """Mixes of a draw with all of their permutations: each has the same probability."""
    return torch.cat([drawn(draw, 20, k)[:, list(order)] for order in itertools.permutations(range(k))])


def amplification(mixes: Tensor) -> float:
    """A = k E|v|^2."""
    return mixes.shape[1] * float(mixes.square().sum(1).mean())


def penalty_factor(mixes: Tensor) -> float:
    """c = (A - 1) / (k (k - 1)): Cov v is c times the projection that takes the mean away."""
    k = mixes.shape[1]
    return (amplification(mixes) - 1) / (k * (k - 1))


def mixed(kernels: Tensor, mix: Tensor) -> Tensor:
    """The package's own weight of a training step."""
    return MajorityKernels(len(kernels)).compose(list(kernels), mix, SITE)


def pulled(kernels: Tensor, mix: Tensor, loss: Loss, scale: float | None = None) -> Tensor:
    """The package's own gradients of the kernels."""
    out = torch.empty_like(kernels)
    method = MajorityKernels(len(kernels), gradient_scale=scale)
    method.pull_back(list(kernels), mix, grad(loss)(mixed(kernels, mix)), SITE, [out])
    return out


def mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def spread(kernels: Tensor) -> Tensor:
    """S."""
    deviations = kernels - kernels.mean(0)
    return deviations.T @ deviations


def slopes(errors: list[float]) -> list[float]:
    """The orders in which errors vanish, each at half of what the one before it was made with."""
    return [math.log2(one / other) for one, other in itertools.pairwise(errors)]
