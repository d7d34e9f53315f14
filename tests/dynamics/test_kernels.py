"""Spread, cosines, draws and amplification of kernels, against numpy, scipy and enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sop import MajorityKernels
from lightning_sop.dynamics import kernels as module
from lightning_sop.dynamics.kernels import (
    KernelProducts,
    amplification,
    draw_entropy,
    kernel_cosines,
    kernel_spread,
    mean_cosine,
    predicted_amplification,
)
from lightning_sop.reparam.base import Site


def reference(kernels: torch.Tensor) -> tuple[float, np.ndarray]:
    """Spread and cosines in float64, kernel by kernel."""
    rows = kernels.double().flatten(1).numpy()
    mean = rows.mean(0)
    k = len(rows)
    spread = math.sqrt(sum(np.sum((row - mean) ** 2) for row in rows) / max(1, k - 1)) / np.linalg.norm(mean)
    cosines = [[a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in rows] for a in rows]
    return spread, np.array(cosines)


@given(
    k=st.integers(1, 6),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_spread_and_cosines_are_those_of_float64(k, shape, offset, dtype, seed):
    kernels = (torch.randn(k, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset).to(dtype)
    spread, cosines = reference(kernels)
    close = 1e-3 if dtype == torch.float32 else 1e-9
    assert float(kernel_spread(kernels)) == pytest.approx(spread, rel=close, abs=1e-12)
    assert kernel_cosines(kernels).numpy() == pytest.approx(cosines, rel=close, abs=1e-5 if close > 1e-6 else 1e-10)
    others = cosines[~np.eye(k, dtype=bool)]
    assert float(mean_cosine(kernels)) == pytest.approx(others.mean() if k > 1 else 1.0, abs=1e-5)


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 0.1, 2.0])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_small_spread_is_not_lost_in_rounding(spread, precision, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1000)
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(1))
    method = MajorityKernels(4, init="spread", spread=spread)
    (kernels,) = method.build(weight, Site("weight", (40, 100)), torch.Generator().manual_seed(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = float(kernel_spread(kernels))
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == pytest.approx(reference(kernels)[0], rel=1e-4)
    assert found == pytest.approx(spread, rel=0.1)  # the option's own meaning


def test_the_first_kernels_have_a_spread_of_the_root_of_their_number():
    weight = torch.randn(64, 128)
    for k in (2, 5):
        method = MajorityKernels(k, init="independent")
        (kernels,) = method.build(weight, Site("weight", (64, 128)), torch.Generator().manual_seed(0))
        assert float(kernel_spread(kernels)) == pytest.approx(math.sqrt(k), rel=0.02)
        assert abs(float(mean_cosine(kernels))) < 0.05  # independent kernels are orthogonal


def test_special_kernels():
    kernel = torch.randn(3, 4)
    assert float(kernel_spread(torch.stack([kernel] * 3))) == 0.0
    assert kernel_cosines(torch.stack([kernel, -2 * kernel])).numpy() == pytest.approx(
        np.array([[1, -1], [-1, 1]]), abs=1e-6
    )
    assert float(kernel_spread(torch.stack([kernel, -kernel]))) == math.inf  # their mean is zero
    assert math.isnan(float(mean_cosine(torch.stack([kernel, 0 * kernel]))))
    assert math.isnan(float(kernel_spread(torch.full((2, 3), math.nan))))
    assert float(kernel_spread(kernel.unsqueeze(0))) == 0.0
    assert float(mean_cosine(kernel.unsqueeze(0))) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_memory_formats(dtype):
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    (kernels,) = MajorityKernels(3).build(weight, Site("weight", weight.shape), torch.Generator().manual_seed(0))
    assert not kernels.is_contiguous()
    assert float(kernel_spread(kernels)) == pytest.approx(reference(kernels)[0], rel=1e-5)
    assert float(kernel_spread(kernels.to(dtype))) == pytest.approx(reference(kernels.to(dtype))[0], rel=1e-5)


def test_products_are_those_of_mean_and_deviations():
    kernels = torch.randn(4, 7, 3, dtype=torch.float64)
    mean = kernels.mean(0)
    rows = torch.stack([mean, *(kernel - mean for kernel in kernels)]).flatten(1)
    assert torch.allclose(KernelProducts.of(kernels).table, rows @ rows.T, atol=1e-12)


# ---------------------------------------------------------------------- mixes


def test_entropy_is_that_of_scipy():
    mixes = MajorityKernels(5, draw="dirichlet", alpha=0.3).draw(
        [Site("w", (2, 2))] * 20, torch.Generator().manual_seed(0), 0
    )
    for mix in mixes:
        assert float(draw_entropy(mix)) == pytest.approx(scipy.stats.entropy(mix.numpy()) / math.log(5), rel=1e-12)
    columns = torch.stack(mixes, dim=1)
    assert draw_entropy(columns).tolist() == pytest.approx([float(draw_entropy(mix)) for mix in mixes])
    assert float(draw_entropy(torch.full((4,), 0.25))) == pytest.approx(1.0)
    assert float(draw_entropy(torch.tensor([0.0, 1.0, 0.0]))) == 0.0
    assert draw_entropy(torch.ones(1, 3)).tolist() == [1.0, 1.0, 1.0]


@given(k=st.integers(1, 8), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_amplification_of_a_mix_lies_between_1_and_k(k, seed):
    (mix,) = MajorityKernels(k).draw([Site("w", (2, 2))], torch.Generator().manual_seed(seed), 0)
    value = float(amplification(mix))
    assert value == pytest.approx(k * sum(v * v for v in mix.tolist()))
    assert 1 - 1e-12 <= value <= k + 1e-12
    assert float(amplification(torch.eye(k)[0])) == k


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("draw", "alpha"),
    [
        ("uniform", 1.0),
        ("dirichlet", 0.2),
        ("dirichlet", 1.0),
        ("dirichlet", 7.0),
        ("softmax_normal", 1.0),
        ("one_hot", 1.0),
    ],
)
def test_the_predicted_amplification_is_that_of_many_draws(draw, alpha, k):
    mixes = MajorityKernels(k, draw=draw, alpha=alpha)._simplex(100_000, torch.Generator().manual_seed(k))
    found = amplification(mixes)
    error = float(found.std() / len(found) ** 0.5)
    assert predicted_amplification(draw, k, alpha) == pytest.approx(float(found.mean()), abs=4.5 * error + 1e-9)


def test_the_predicted_amplification_has_its_exact_values():
    assert predicted_amplification("uniform", 2) == pytest.approx(4 * (1 - math.log(2)), rel=1e-10)  # by hand
    normal = scipy.stats.norm(scale=math.sqrt(2))  # v_1 is the logistic function of a difference of two
    square, _ = scipy.integrate.quad(lambda x: normal.pdf(x) / (1 + math.exp(-x)) ** 2, -30, 30)
    assert predicted_amplification("softmax_normal", 2) == pytest.approx(4 * square, rel=1e-9)
    assert predicted_amplification("dirichlet", 4, 1.0) == pytest.approx(8 / 5)
    assert predicted_amplification("one_hot", 6) == 6


def test_annealing_scales_what_is_above_1():
    method = MajorityKernels(4, anneal=0.5)
    mixes = [method.draw([Site("w", (2, 2))], torch.Generator().manual_seed(n), 0.8)[0] for n in range(4000)]
    found = torch.stack([amplification(mix) for mix in mixes])
    assert predicted_amplification("uniform", 4, 1.0, 0.4) == pytest.approx(float(found.mean()), abs=0.002)
    assert predicted_amplification("uniform", 4, 1.0, 0.0) == 1.0


def test_an_unknown_draw_is_refused():
    with pytest.raises(ValueError, match="cauchy"):
        predicted_amplification("cauchy", 3)
