"""Majority Kernels against its equations: what a step does to the kernels and to their mean."""

from __future__ import annotations

import copy
import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from lightning_sop import MajorityKernels, expand_
from lightning_sop.reparam.majority import Draw, Granularity
from tests.conformance.references import ConvexMix, out_axis
from tests.reparam.nets import loss_of, perceptron

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 3, 3)),
    "conv_transpose1d_groups": (lambda: nn.ConvTranspose1d(4, 6, 2, groups=2), (2, 4, 3)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 2, 2, 2)),
    "bilinear": (lambda: Square(nn.Bilinear(3, 3, 4)), (2, 3)),
}


class Square(nn.Module):
    """A bilinear layer of one input."""

    def __init__(self, layer: nn.Bilinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def stacked(phi: list[nn.Parameter]) -> Tensor:
    return torch.stack([kernel.detach() for kernel in phi])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize(("draw", "granularity"), list(itertools.product(get_args(Draw), get_args(Granularity))))
def test_kernel_gradients_are_the_mix_times_the_weight_gradient(
    layer: str, scale: float | None, draw: str, granularity: str
) -> None:
    """Grad_i = s v_i G, in closed form as by autograd, per output where the layer has its outputs."""
    build, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = expand_(model, optimizer, MajorityKernels(3, draw, granularity=granularity, gradient_scale=scale))
    form = next(iter(engine.forms.values()))
    before, mix, x = stacked(form.phi), form.mix, torch.randn(shape, dtype=torch.float64)
    leaves = before.clone().requires_grad_()
    owner = model.get_submodule(form.site.name.rpartition(".")[0])
    weight = ConvexMix(3).mixed(list(leaves), mix, out_axis(owner))
    loss = torch.func.functional_call(copy.deepcopy(model), {form.site.name: weight}, x).square().sum()
    (expected,) = torch.autograd.grad(loss, leaves)
    model(x).square().sum().backward()
    plain = form.parameter.grad.clone()
    optimizer.step()
    moved = before - stacked(form.phi)
    torch.testing.assert_close(moved, (3 if scale is None else scale) * expected, rtol=1e-10, atol=1e-12)
    if granularity != "out_channel":
        torch.testing.assert_close(expected, torch.stack([v * plain for v in mix]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("draw", get_args(Draw))
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}],
    ids=["plain", "decay", "momentum_decay", "nesterov"],
)
def test_sgd_moves_the_mean_kernel_as_it_would_the_plain_weight(options: dict, draw: str, granularity: str) -> None:
    """M <- M - h (G + lambda M), whatever the mixes, for the gradients G that the mixed network has."""
    model, shadow = perceptron(), perceptron()
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, **options) for m in (model, shadow))
    expand_(model, ours, MajorityKernels(4, draw, granularity=granularity))
    for step in range(6):
        ours.zero_grad()
        loss_of(model, step).backward()
        for plain, parameter in zip(shadow.parameters(), model.parameters(), strict=True):
            plain.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for name, weight in shadow.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("draw", ["uniform", "dirichlet", "softmax_normal"])  # one-hot gradients may be zero: 0 / 0
def test_adam_does_not_notice_the_gradient_scale(draw: str, granularity: str) -> None:
    """Adam divides by the gradient's own size: with eps = 0 any scale gives the same kernels."""
    kernels = []
    for scale in (None, 1.0):
        model = perceptron()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=0.0)
        method = MajorityKernels(3, draw, granularity=granularity, gradient_scale=scale)
        engine = expand_(model, optimizer, method, seed=0)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        kernels.append([stacked(form.phi) for form in engine.forms.values()])
    for one, other in zip(*kernels, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused_adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_kernel_is_bitwise_the_plain_run(name: str, granularity: str) -> None:
    model, plain = perceptron(dtype=torch.float32), perceptron(dtype=torch.float32)
    ours, theirs = (OPTIMIZERS[name](m.parameters()) for m in (model, plain))
    expand_(model, ours, MajorityKernels(1, granularity=granularity))
    for step in range(5):
        for network, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            loss_of(network, step, torch.float32).backward()
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
        assert list(ours.state[a]) == list(theirs.state[b])
        for key, value in theirs.state[b].items():
            assert torch.equal(torch.as_tensor(ours.state[a][key]), torch.as_tensor(value)), key


def test_one_layer_draws_one_mix_a_step_and_layers_differ_only_where_asked() -> None:
    for granularity, shapes, shared in (("layer", (3,), False), ("step", (3,), True), ("out_channel", (3, 6), False)):
        model = perceptron()
        engine = expand_(model, torch.optim.SGD(model.parameters()), MajorityKernels(3, granularity=granularity))
        first, second, third = (form.mix for form in engine.forms.values())
        assert first.shape == shapes
        assert (torch.equal(second, third) if second.shape == third.shape else False) == shared
        for mix in (first, second, third):
            torch.testing.assert_close(mix.sum(0), torch.ones_like(mix[0]), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("progress", [0.0, 0.4, 0.55, 0.8, 1.0])
def test_annealing_shrinks_the_mix_linearly_to_the_mean(progress: float) -> None:
    mixes = []
    for anneal in (0.0, 0.5):
        model = perceptron()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = expand_(model, optimizer, MajorityKernels(4, anneal=anneal), seed=0)
        engine.progress = progress
        loss_of(model).backward()
        optimizer.step()
        mixes.append(engine.forms["0.weight"].mix)
    kept = min(1.0, (1 - progress) / 0.5)
    torch.testing.assert_close(mixes[1] - 0.25, kept * (mixes[0] - 0.25), rtol=1e-12, atol=1e-15)
