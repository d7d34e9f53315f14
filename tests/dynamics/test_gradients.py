"""Norms, the implicit term of gradient descent, optimizer state, and losses under two sets of weights."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sop.dynamics.gradients import implicit_regularization, norm_of
from lightning_sop.dynamics.losses import loss_gap
from lightning_sop.dynamics.moments import state_norms


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_norms_are_those_of_numpy(dtype):
    tensor = (300 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    wide = tensor.to(torch.complex128 if dtype.is_complex else torch.float64)
    assert float(norm_of(tensor)) == pytest.approx(float(np.linalg.norm(wide.numpy())), rel=1e-5)


def test_norms_of_sparse_gradients_and_of_what_is_not_finite():
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    assert embedding.weight.grad.is_sparse
    assert float(norm_of(embedding.weight.grad)) == pytest.approx(math.sqrt(3 * 4 + 3 * 1))  # the row of 1 counts twice
    assert float(norm_of(torch.tensor([1.0, math.inf]))) == math.inf
    assert math.isnan(float(norm_of(torch.tensor([1.0, math.nan]))))


def test_the_implicit_term_by_hand():
    assert implicit_regularization([3.0], [0.1]) == pytest.approx(0.1 / 4 * 9)
    assert implicit_regularization([3.0, 2.0], [0.1, 0.5]) == pytest.approx((0.1 * 9 + 0.5 * 4) / 4)
    assert implicit_regularization([3.0, 2.0], [0.1, 0.5], [1.5, 1.0]) == pytest.approx((0.15 * 9 + 0.5 * 4) / 4)
    assert implicit_regularization([], []) == 0.0
    with pytest.raises(ValueError, match="shorter"):
        implicit_regularization([1.0], [])


@pytest.mark.parametrize("with_it", [True, False])
def test_a_step_with_rates_by_group_follows_the_loss_with_the_term(with_it):
    """The error of one step falls by 2³ with the term when the rates are halved, by 2² without; gradients by differences."""
    first, second = np.array([0.9, -0.4]), np.array([0.7])

    def loss(x):
        return float(np.sin(x[0]) * x[1] + 0.5 * x[2] ** 2 * x[0] + 0.25 * x[1] ** 4 + x[2])

    def gradient(f, x, e=1e-4):
        return np.array([(f(x + e * unit) - f(x - e * unit)) / (2 * e) for unit in np.eye(len(x))])

    def error(h):
        rates = np.array([h, h, 3 * h])

        def modified(x):
            g = gradient(loss, x)
            groups = [float(np.linalg.norm(g[:2])), float(abs(g[2]))]
            return loss(x) + (implicit_regularization(groups, [h, 3 * h]) if with_it else 0.0)

        def field(x):  # the flow, for time h, of the first group
            return -rates / h * gradient(modified, x)

        x = start = np.concatenate([first, second])
        pieces = 20
        for _ in range(pieces):  # Runge-Kutta
            t = h / pieces
            a = field(x)
            b = field(x + t / 2 * a)
            c = field(x + t / 2 * b)
            d = field(x + t * c)
            x = x + t / 6 * (a + 2 * b + 2 * c + d)
        return float(np.linalg.norm(start - rates * gradient(loss, start) - x))

    order = math.log2(error(0.04) / error(0.02))
    assert order == pytest.approx(3 if with_it else 2, abs=0.15)


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), torch.optim.Adafactor]
)
def test_the_norms_of_an_optimizers_state(make):
    weight = nn.Parameter(torch.randn(4, 3))
    optimizer = make([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    state = optimizer.state[weight]
    norms = state_norms(state)
    assert norms and set(norms) == {name for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}
    for name, norm in norms.items():
        assert float(norm) == pytest.approx(float(np.linalg.norm(state[name].double().numpy())), rel=1e-6)
    assert "step" not in norms


def test_the_state_of_sgd_without_momentum_has_no_norms():
    assert state_norms({"momentum_buffer": None}) == {}


def test_losses_under_two_sets_of_weights_leave_the_network_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    inputs, targets = torch.randn(8, 3), torch.randn(8, 1)
    mixed, collapsed = torch.randn(4, 3), torch.randn(4, 3)

    def loss(net):
        return F.mse_loss(net(inputs), targets)

    expected = []
    for weight in (mixed, collapsed):
        with torch.no_grad():
            network[0].weight.copy_(weight)
        network[1].reset_running_stats()
        expected.append(float(loss(network).detach()))
    network[1].reset_running_stats()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = loss_gap(loss, functools.partial(copy.deepcopy, network), {"0.weight": mixed}, {"0.weight": collapsed})
    assert [float(found.mixed), float(found.collapsed)] == pytest.approx(expected)
    assert float(found.gap) == pytest.approx(expected[0] - expected[1])
    assert not found.mixed.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_what_a_network_keeps_from_call_to_call_is_no_difference_between_losses():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.hidden = nn.RNNCell(3, 4), None

        def forward(self, x):
            self.hidden = self.cell(x, self.hidden)
            return self.hidden

    network, inputs = Recurrent(), torch.randn(8, 3)
    weights = {"cell.weight_ih": network.cell.weight_ih.detach().clone()}
    fresh = functools.partial(copy.deepcopy, network)
    assert loss_gap(lambda net: net(inputs).square().sum(), fresh, weights, weights).gap == 0
