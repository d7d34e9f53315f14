"""Majority Kernels: how the spread of the kernels goes on, in expectation and in a simulated training.

The statements are those of docs/methods/majority_kernels.md, in the notation of ``expectations``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from lightning_sop import MajorityKernels, expand_
from tests.reparam.expectations import (
    DRAWS,
    HESSIAN,
    SIZE,
    SLOPE,
    K,
    amplification,
    drawn,
    exchangeable,
    mean,
    numbers,
    penalty_factor,
    pulled,
    quadratic,
    slopes,
    spread,
)
from tests.reparam.test_majority_random import within


def fourth_moment(mixes: Tensor) -> float:
    """q = E|v - 1/k|^4 / (k - 1)."""
    k = mixes.shape[1]
    return float((mixes - 1 / k).square().sum(1).square().mean()) / (k - 1)


def next_spread(s: Tensor, mixes: Tensor, step: float, curvature: Tensor, slope: Tensor) -> Tensor:
    """One step of S on average, M held fixed, for a constant Hessian; ``step`` is the gradient scale times the rate."""
    c, k = penalty_factor(mixes), mixes.shape[1]
    decay, fed = c * (curvature @ s + s @ curvature), (amplification(mixes) - 1) / k * torch.outer(slope, slope)
    return s - step * decay + step**2 * fed + step**2 * fourth_moment(mixes) * curvature @ s @ curvature


def settled(mixes: Tensor, step: float) -> Tensor:
    """The S that a step leaves as it is, from the linear equation."""
    zero = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    fed = next_spread(zero, mixes, step, HESSIAN, SLOPE)
    units = torch.eye(SIZE**2, dtype=torch.float64).view(-1, SIZE, SIZE)
    kept = torch.stack([next_spread(unit, mixes, step, HESSIAN, SLOPE) - fed for unit in units]).flatten(1).T
    return torch.linalg.solve(torch.eye(SIZE**2, dtype=torch.float64) - kept, fed.flatten()).view(SIZE, SIZE)


def settled_for_small_steps(step: float) -> Tensor:
    """The solution of HS + SH = s h (k-1) GG', where G is the gradient at the mean kernel."""
    values, vectors = torch.linalg.eigh(HESSIAN)
    slope = vectors.T @ SLOPE
    solution = step * (K - 1) * torch.outer(slope, slope) / (values[:, None] + values)
    return vectors @ solution @ vectors.T


@DRAWS
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_step_of_the_spread(draw: str, scale: float) -> None:
    """S <- S - s h c (HS + SH) + s² h² ((A-1)/k) GG' + s² h² q HSH, exactly, where the Hessian is constant."""
    kernels, mixes, rate = numbers(K, SIZE, seed=7), exchangeable(draw), 0.1
    after = mean(spread(kernels - rate * pulled(kernels, mix, quadratic, scale)) for mix in mixes)
    slope = grad(quadratic)(kernels.mean(0))
    expected = next_spread(spread(kernels), mixes, scale * rate, HESSIAN, slope)
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)


@DRAWS
def test_the_spread_settles_for_small_steps_where_the_equation_says(draw: str) -> None:
    """HS + SH = s h (k-1) GG' for every draw, and a penalty of (s h / 4k)(A-1) |G|²: up to a part of the order s h H."""
    mixes, gaps, steps = exchangeable(draw), [], (0.004, 0.002, 0.001)
    for step in steps:
        small, exact = settled_for_small_steps(step), settled(mixes, step)
        both = HESSIAN @ small + small @ HESSIAN
        torch.testing.assert_close(both, step * (K - 1) * torch.outer(SLOPE, SLOPE), rtol=1e-10, atol=1e-14)
        gaps.append(float((exact - small).norm() / small.norm()))
        penalty = penalty_factor(mixes) / 2 * (HESSIAN * small).sum()
        value = step / (4 * K) * (amplification(mixes) - 1) * SLOPE.square().sum()
        torch.testing.assert_close(penalty, value, rtol=1e-10, atol=1e-14)
    assert slopes(gaps) == pytest.approx([1, 1], abs=0.05)
    assert gaps[0] < steps[0] * float(torch.linalg.eigvalsh(HESSIAN).max())


@DRAWS
def test_the_time_in_which_the_spread_settles(draw: str) -> None:
    """Along a curvature λ, S comes nearer to where it settles by a factor of e in 1 / (2 s h c λ) steps."""
    mixes, step = exchangeable(draw), 0.004
    end, s = settled(mixes, step), torch.zeros(SIZE, SIZE, dtype=torch.float64)
    value, direction = (part[..., 0] for part in torch.linalg.eigh(HESSIAN))
    for _ in range(round(float(1 / (2 * step * penalty_factor(mixes) * value)))):
        s = next_spread(s, mixes, step, HESSIAN, SLOPE)
    reached = float(direction @ s @ direction / (direction @ end @ direction))
    assert reached == pytest.approx(1 - math.exp(-1), rel=0.01)


def simulated(draw: str, rate: float, chains: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """S and loss of so many independent rows of a layer in training; the mean kernel is held at 0."""
    layer = nn.Linear(SIZE, chains, bias=False).double()
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    engine = expand_(layer, optimizer, MajorityKernels(K, draw, granularity="out_channel"), seed=0)
    (form,) = engine.forms.values()
    for _ in range(steps):
        optimizer.zero_grad()
        losses = quadratic(layer.weight)
        losses.sum().backward()
        kernels = torch.stack([kernel.detach() for kernel in form.phi])
        yield torch.einsum("knd,kne->nde", kernels, kernels), losses.detach()
        optimizer.step()
        layer.eval()
        with torch.no_grad():
            layer.weight.zero_()  # all kernels move by the same
        layer.train()


@DRAWS
def test_kernels_in_training_spread_as_the_equation_says(draw: str) -> None:
    """From equal kernels to where S has settled, with M held fixed; within 5 standard errors over 1500 independent rows."""
    rate, chains, mixes = 0.05, 1500, drawn(draw, 200_000)
    least = float(torch.linalg.eigvalsh(HESSIAN).min())
    time = 1 / (2 * K * rate * penalty_factor(mixes) * least)  # in which the slowest part comes nearer by a factor of e
    steps = 6 * math.ceil(time)
    expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    late, late_expected, late_losses = [], [], []
    for step, (found, losses) in enumerate(simulated(draw, rate, chains, steps)):
        if step in (1, math.ceil(time / 4), math.ceil(time)):
            assert within(found, expected, slack=0.01 * float(expected.abs().max())), step
        if step >= steps // 2:
            late.append(found), late_expected.append(expected), late_losses.append(losses)
        expected = next_spread(expected, mixes, K * rate, HESSIAN, SLOPE)
    torch.testing.assert_close(expected, settled(mixes, K * rate), rtol=0.02, atol=0.01 * float(expected.abs().max()))
    # the mean over the later half of each row, so that one row is one independent value
    assert within(mean(late), mean(late_expected), slack=0.01 * float(expected.abs().max()))
    penalty = penalty_factor(mixes) / 2 * (HESSIAN * mean(late_expected)).sum()
    assert within(mean(late_losses), penalty, slack=0.01 * float(penalty))
