"""Majority Kernels: what its equations imply for the mean kernel, the loss and implicit regularization.

The statements are those of docs/methods/majority_kernels.md, in the notation of ``expectations``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev

from lightning_sop import MajorityKernels, expand_
from lightning_sop.reparam import Site
from tests.reparam.expectations import (
    DRAWS,
    SIZE,
    K,
    Loss,
    amplification,
    curved,
    drawn,
    exchangeable,
    mean,
    mixed,
    numbers,
    penalty_factor,
    pulled,
    quadratic,
    slopes,
    spread,
)
from tests.reparam.nets import loss_of, perceptron

# ---------------------------------------------------------------------- the mean kernel


@pytest.mark.parametrize("scale", [1.0, 0.3, 6.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_any_gradient_scale_moves_the_mean_kernel_in_proportion(scale: float, decay: float) -> None:
    """M <- M - h ((s/k) G + λM): with s = 1 the mean kernel is trained with the learning rate h / k."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
    engine = expand_(model, optimizer, MajorityKernels(4, gradient_scale=scale), seed=0)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        gradients = {name: form.parameter.grad.clone() for name, form in engine.forms.items()}
        optimizer.step()
        for name, gradient in gradients.items():
            expected = before[name] - 0.1 * (scale / 4 * gradient + decay * before[name])
            torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-12, atol=1e-12)


@DRAWS
def test_adam_moves_the_mean_kernel_by_the_root_of_a_less(draw: str) -> None:
    """Under a constant gradient each plain weight moves by the learning rate, the mean kernel by that over √A."""
    model = torch.nn.Linear(1, 400, bias=False, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    engine = expand_(model, optimizer, MajorityKernels(4, draw, granularity="out_channel", anneal=0.0), seed=0)
    (form,) = engine.forms.values()
    steps, moved = 100, 0.0
    for step in range(1000 + steps):  # first, the second moments become those of the draw
        before = form.collapsed()
        optimizer.zero_grad()
        model.weight.sum().backward()
        optimizer.step()
        if step >= 1000:
            moved += float((before - form.collapsed()).mean()) / (1e-3 * steps)
    assert moved == pytest.approx(1 / math.sqrt(amplification(drawn(draw, 10_000, 4))), rel=0.01)


@DRAWS
@pytest.mark.parametrize("k", [2, 4])
def test_the_first_mixed_weight_has_a_times_the_variance(draw: str, k: int) -> None:
    """For a Gaussian weight of variance σ², init="independent" gives mixes of variance A σ² on average."""
    weight = 0.3 * numbers(200, 200)
    method = MajorityKernels(k, draw, init="independent")
    site = Site("weight", (200, 200))
    (kernels,) = method.build(weight, site, torch.Generator().manual_seed(0))
    mixes = drawn(draw, 100, k)
    variance = mean(method.compose(list(kernels), mix, site).square().mean() / 0.09 for mix in mixes)
    # 40000 values: the variance of one mix is known to 0.7 percent, and all of these share their kernels
    assert float(variance) == pytest.approx(amplification(mixes), rel=5 * math.sqrt(2 / weight.numel()))


@DRAWS
@pytest.mark.parametrize("k", [2, 3, 8])
def test_amplification_lies_between_1_and_k(draw: str, k: int) -> None:
    """Of every single mix, so of their mean: |v|^2 is at least 1/k and at most 1."""
    squares = k * drawn(draw, 1000, k).square().sum(1)
    assert float(squares.min()) >= 1 - 1e-12
    assert float(squares.max()) <= k + 1e-12


# ---------------------------------------------------------------------- the curvature penalty


def penalized(kernels: Tensor, loss: Loss, factor: float) -> Tensor:
    """The loss at the mean kernel, plus the curvature penalty."""
    middle = kernels.mean(0)
    return loss(middle) + factor / 2 * (jacrev(grad(loss))(middle) * spread(kernels)).sum()


@DRAWS
@pytest.mark.parametrize("k", [2, 3, 4])
def test_mean_loss_of_the_mixes_is_the_penalized_loss_of_the_mean(draw: str, k: int) -> None:
    """E_v L(W) = L(M) + ½ c Σ D_i' H D_i, and so for the gradients: exactly, where the Hessian is constant."""
    kernels, mixes = numbers(k, SIZE, seed=4), exchangeable(draw, k)
    factor = penalty_factor(mixes)
    losses = mean(quadratic(mixed(kernels, mix)) for mix in mixes)
    torch.testing.assert_close(losses, penalized(kernels, quadratic, factor), rtol=1e-12, atol=1e-12)
    gradients = mean(pulled(kernels, mix, quadratic, scale=1.0) for mix in mixes)
    torch.testing.assert_close(gradients, grad(penalized)(kernels, quadratic, factor), rtol=1e-12, atol=1e-12)


@DRAWS
def test_curvature_penalty_is_right_to_second_order(draw: str) -> None:
    """What is left out vanishes with the third power of the deviations, the penalty with the second."""
    middle, deviations, mixes = numbers(SIZE, seed=5), numbers(K, SIZE, seed=6), exchangeable(draw)
    left, whole = [], []
    for size in (0.005, 0.0025, 0.00125):
        kernels = middle + size * (deviations - deviations.mean(0))
        losses = mean(curved(mixed(kernels, mix)) for mix in mixes)
        left.append(abs(float(losses - penalized(kernels, curved, penalty_factor(mixes)))))
        whole.append(abs(float(losses - curved(middle))))
    assert slopes(left) == pytest.approx([3, 3], abs=0.1)
    assert slopes(whole) == pytest.approx([2, 2], abs=0.1)


# ---------------------------------------------------------------------- implicit gradient regularization


def after(kernels: Tensor, mixes: Iterable[Tensor], rate: float, loss: Loss) -> Tensor:
    """The mean kernel after one step of SGD for each mix."""
    for mix in mixes:
        kernels = kernels - rate * pulled(kernels, mix, loss)
    return kernels.mean(0)


def flow(w: Tensor, loss: Loss, time: float, steps: int = 8) -> Tensor:
    """Gradient flow, by the Runge-Kutta method of order 4: as good as exact here."""
    part = time / steps
    for _ in range(steps):
        first = -grad(loss)(w)
        second = -grad(loss)(w + part / 2 * first)
        third = -grad(loss)(w + part / 2 * second)
        fourth = -grad(loss)(w + part * third)
        w = w + part / 6 * (first + 2 * second + 2 * third + fourth)
    return w


def orders_against_flows(runs: list[tuple[Tensor, ...]], factors: Iterable[float]) -> list[list[float]]:
    """How fast the mean of these runs approaches the flow of loss + factor (h/4) |gradient|², for smaller and smaller h."""
    start, errors = numbers(SIZE, seed=5), []
    for rate in (0.08, 0.04, 0.02):
        reached = mean(after(start.expand(K, -1), run, rate, curved) for run in runs)
        flows = [
            flow(start, lambda w, f=f * rate / 4: curved(w) + f * grad(curved)(w).square().sum(), len(runs[0]) * rate)
            for f in factors
        ]
        errors.append([float((reached - end).norm()) for end in flows])
    return [slopes(list(column)) for column in zip(*errors, strict=True)]


def rotations(draw: str) -> tuple[list[Tensor], float]:
    """The most uneven of 20 mixes in its three rotations, which have exchangeable second moments; and its A."""
    mix = max(drawn(draw, 20), key=lambda v: float(v.square().sum()))
    return [mix.roll(shift) for shift in range(K)], amplification(mix[None])


@DRAWS
def test_mixes_without_replacement_multiply_the_implicit_regularization_by_a(draw: str) -> None:
    """From equal kernels, over all orders of three mixes, M follows the flow of L + A (h/4) |G|²; with A = 1 it does not."""
    mixes, a = rotations(draw)
    right, plain = orders_against_flows(list(itertools.permutations(mixes)), (a, 1.0))
    assert right == pytest.approx([3, 3], abs=0.15)
    assert plain == pytest.approx([2, 2], abs=0.15)


@DRAWS
def test_independent_mixes_move_the_mean_kernel_as_plain_sgd_does_at_first(draw: str) -> None:
    """As the package draws them, from equal kernels: L + (h/4) |G|², the plain term. The rest is in the spread."""
    mixes, a = rotations(draw)
    plain, amplified = orders_against_flows(list(itertools.product(mixes, repeat=K)), (1.0, a))
    assert plain == pytest.approx([3, 3], abs=0.15)
    assert amplified == pytest.approx([2, 2], abs=0.15)


@DRAWS
def test_where_the_hessian_is_constant_independent_mixes_move_the_mean_kernel_as_plain_sgd_does(draw: str) -> None:
    """On average and exactly, whatever the spread: its penalty has a value there and no force on M."""
    kernels, (mixes, _) = numbers(K, SIZE, seed=8), rotations(draw)
    reached = mean(after(kernels, run, 0.1, quadratic) for run in itertools.product(mixes, repeat=K))
    plain = kernels.mean(0)
    for _ in range(K):
        plain = plain - 0.1 * grad(quadratic)(plain)
    torch.testing.assert_close(reached, plain, rtol=1e-12, atol=1e-12)
