"""Majority Kernels: the distributions of the mixes and of the first kernels, and the arguments that are refused."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lightning_sop import MajorityKernels
from lightning_sop.reparam import Site
from lightning_sop.reparam.majority import Draw

COUNT = 40_000
# k E|v|^2, the factor on the implicit regularization by gradient noise; uniform and softmax known to two decimals.
AMPLIFICATION = {
    "dirichlet": dict(zip((2, 3, 4, 8), (4 / 3, 3 / 2, 8 / 5, 16 / 9), strict=True)),
    "uniform": dict(zip((2, 3, 4, 8), (1.23, 1.29, 1.31, 1.33), strict=True)),
    "softmax_normal": dict(zip((2, 3, 4, 8), (1.27, 1.44, 1.57, 1.86), strict=True)),
    "one_hot": {2: 2.0, 3: 3.0, 4: 4.0, 8: 8.0},
}


def draws(method: MajorityKernels, count: int = COUNT, seed: int = 0) -> Tensor:
    """Independent mixes, one for each of so many layers, of shape ``(count, k)``."""
    sites = [Site(str(index), (2, 2)) for index in range(count)]
    return torch.stack(method.draw(sites, torch.Generator().manual_seed(seed), 0.0))


def within(values: Tensor, expected: float | Tensor, slack: float = 0.0) -> bool:
    """Whether a mean over the first axis is within 5 standard errors of what is expected."""
    error = values.std(0) / math.sqrt(len(values))
    return bool(((values.mean(0) - expected).abs() <= 5 * error + slack + 1e-12).all())


@pytest.mark.parametrize("k", [2, 3, 4, 8])
@pytest.mark.parametrize("draw", get_args(Draw))
def test_mixes_are_exchangeable_on_the_simplex(draw: str, k: int) -> None:
    v = draws(MajorityKernels(k, draw))
    assert v.shape == (COUNT, k)
    assert float(v.min()) >= 0
    torch.testing.assert_close(v.sum(1), torch.ones(COUNT, dtype=v.dtype), rtol=1e-14, atol=1e-14)
    assert within(v, 1 / k)
    assert within(k * v.square().sum(1), AMPLIFICATION[draw][k], slack=0.0 if draw in ("dirichlet", "one_hot") else 0.006)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("k", [2, 5])
def test_dirichlet_variance_and_covariance(k: int, alpha: float) -> None:
    """Var v_i = (k-1) / (k^2 (k alpha + 1)), Cov = (I - 11'/k) / (k (k alpha + 1))."""
    v = draws(MajorityKernels(k, "dirichlet", alpha=alpha))
    centred = v - 1 / k
    expected = (torch.eye(k) - 1 / k) / (k * (k * alpha + 1))
    assert float(expected[0, 0]) == pytest.approx((k - 1) / (k**2 * (k * alpha + 1)), rel=1e-6)
    assert within(torch.einsum("ni,nj->nij", centred, centred), expected.double(), slack=1e-8)
    assert within(k * v.square().sum(1), k * (alpha + 1) / (k * alpha + 1))


def test_uniform_mixes_are_uniform_numbers_divided_by_their_sum() -> None:
    """For two kernels P(v_1 <= t) = t / (2 (1 - t)) below one half, by the area of a triangle in the unit square."""
    v = draws(MajorityKernels(2))[:, 0]
    for t in (0.1, 0.25, 0.4):
        assert within((v <= t).double(), t / (2 * (1 - t)))


def test_softmax_mixes_are_softmax_of_independent_normal_numbers() -> None:
    v = draws(MajorityKernels(3, "softmax_normal"))
    logits = v.log() - v.log().mean(1, keepdim=True)  # what softmax leaves of them
    assert within(logits, 0.0)
    assert within(torch.einsum("ni,nj->nij", logits, logits), torch.eye(3, dtype=v.dtype) - 1 / 3)


def test_a_tiny_alpha_is_one_hot_and_never_undefined() -> None:
    v = draws(MajorityKernels(3, "dirichlet", alpha=1e-4), 2000)
    assert torch.isfinite(v).all()
    assert float(v.amax(1).median()) > 0.999


def test_output_channels_have_mixes_of_their_own() -> None:
    method = MajorityKernels(3, granularity="out_channel")
    sites = [Site("a", (5, 2)), Site("b", (2, 7, 3), out_axis=1)]
    first, second = method.draw(sites, torch.Generator().manual_seed(0), 0.0)
    assert (first.shape, second.shape) == ((3, 5), (3, 7))
    columns = torch.cat([first, second], 1).T
    assert len({tuple(column.tolist()) for column in columns}) == 12
    torch.testing.assert_close(columns.sum(1), torch.ones(12, dtype=columns.dtype), rtol=1e-14, atol=1e-14)


def kernels(weight: Tensor, **options: Any) -> Tensor:
    near = options.pop("near", False)
    generator = torch.Generator().manual_seed(1)
    return MajorityKernels(**options).build(weight, Site("w", tuple(weight.shape)), generator, near=near)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["independent", "spread"])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_mean_of_the_first_kernels_is_the_weight(k: int, init: str, dtype: torch.dtype) -> None:
    weight = (0.1 * torch.randn(40, 30, generator=torch.Generator().manual_seed(0))).to(dtype)
    stack = kernels(weight, factor=k, init=init)
    assert stack.shape == (k, 40, 30)
    assert stack.dtype == dtype
    rounding = torch.finfo(dtype).eps * float(stack.abs().max())
    torch.testing.assert_close(stack.double().mean(0), weight.double(), rtol=0, atol=rounding)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_first_kernels_of_a_gaussian_weight_are_independent_of_variance_k(k: int) -> None:
    weight = 0.3 * torch.randn(300, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = kernels(weight, factor=k, init="independent").flatten(1).T / 0.3
    assert within(torch.einsum("ni,nj->nij", w, w), k * torch.eye(k, dtype=w.dtype), slack=0.01 * k)
    fourth = (w / math.sqrt(k)).pow(4)
    assert within(fourth, 3.0, slack=0.03)


def test_spread_is_relative_to_the_weight_and_zero_copies_it() -> None:
    weight = torch.randn(200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    deviations = kernels(7 * weight, factor=4, init="spread", spread=0.1) - 7 * weight
    assert float(deviations.square().mean().sqrt()) == pytest.approx(0.7 * math.sqrt(3 / 4), rel=0.02)
    near = kernels(7 * weight, factor=4, init="independent", spread=0.1, near=True)
    torch.testing.assert_close(near - 7 * weight, deviations)
    assert torch.equal(kernels(weight, factor=3, init="spread", spread=0.0), weight.expand(3, -1, -1))
    assert torch.equal(kernels(weight, factor=1), weight[None])
    assert torch.equal(kernels(torch.zeros(3, 2), factor=3), torch.zeros(3, 3, 2))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("factor", value) for value in (0, -1, 2.5, True, "4", None)],
        *[("draw", value) for value in ("gauss", "", None)],
        *[("alpha", value) for value in (0.0, -1.0, math.inf, math.nan)],
        ("granularity", "batch"),
        ("init", "zero"),
        *[("spread", value) for value in (-0.1, math.inf, math.nan)],
        *[("anneal", value) for value in (-0.1, 1.1, math.nan)],
        *[("gradient_scale", value) for value in (0.0, -1.0, math.inf, math.nan)],
    ],
)
def test_wrong_arguments_are_refused_by_name(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        MajorityKernels(**{argument: value})
