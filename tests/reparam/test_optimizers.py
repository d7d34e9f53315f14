"""Every optimizer of torch, and sharpness-aware ones of users, move φ as they move leaves of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Optimizer

from lightning_sop import MajorityKernels, expand_
from lightning_sop.reparam import TrainingForm
from tests.reparam.nets import Pair, is_plain, loss_of, perceptron
from tests.reparam.sam import TwoStepSAM, WholeStepSAM

O = torch.optim  # noqa: E741
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: O.SGD(p, lr=0.05),
    "sgd_momentum": lambda p: O.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "sgd_dampening": lambda p: O.SGD(p, lr=0.05, momentum=0.9, dampening=0.3, foreach=True),
    "adam_amsgrad": lambda p: O.Adam(p, lr=0.01, amsgrad=True),
    "adamw_foreach": lambda p: O.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw_loop": lambda p: O.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw_fused": lambda p: O.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adafactor": lambda p: O.Adafactor(p, lr=0.05),
    "rmsprop": lambda p: O.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: O.Adagrad(p, lr=0.05),
    "adadelta": lambda p: O.Adadelta(p),
    "adamax": lambda p: O.Adamax(p, lr=0.01),
    "nadam": lambda p: O.NAdam(p, lr=0.01),
    "radam": lambda p: O.RAdam(p, lr=0.01),
    "rprop": lambda p: O.Rprop(p, lr=0.01),
    "asgd": lambda p: O.ASGD(p, lr=0.05, t0=2),
}


@pytest.mark.parametrize("granularity", ["layer", "out_channel"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_twin(name: str, granularity: str) -> None:
    pair = Pair(OPTIMIZERS[name], MajorityKernels(3, granularity=granularity))
    compare(pair, steps=8)


@pytest.mark.parametrize("muon", [O.Muon] if hasattr(O, "Muon") else [])  # torch has it since 2.9
def test_muon_equals_the_twin(muon: type[Optimizer]) -> None:
    compare(Pair(lambda p: muon(p, lr=0.02), bias=False), steps=5, rounding=1e-3)  # it orthogonalizes in bfloat16


class ClippedSGD(SGD):
    """Edits gradients in its step, before those of the class it extends."""

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            nn.utils.clip_grad_value_(group["params"], 1e-3)
        super().step()
        return loss


def test_a_subclass_that_edits_gradients_before_super_step_equals_the_twin() -> None:
    compare(Pair(lambda p: ClippedSGD(p, lr=0.1, momentum=0.9)), steps=5)


class ReplacesData(Optimizer):
    """Gives parameters new memory, where most optimizers write into the old."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data - 0.1 * parameter.grad


def test_an_optimizer_that_replaces_data_equals_the_twin_and_can_be_saved() -> None:
    pair = Pair(ReplacesData)
    compare(pair, steps=3)
    for name, saved in pair.engine.state_dict()["forms"].items():
        assert torch.equal(saved["storage"][0], torch.stack(list(pair.engine.forms[name].phi)))


def compare(pair: Pair, steps: int, rounding: float = 1e-10) -> None:
    for step in range(steps):
        for network, optimizer in pair.sides:
            optimizer.zero_grad()
            loss_of(network, step).backward()
        for _, optimizer in pair.sides:
            optimizer.step()
        assert is_plain(pair.optimizer, pair.model)
        assert pair.gap() < rounding, f"step {step}"


CLOSURE_OPTIMIZERS = {
    "lbfgs": lambda p: O.LBFGS(p, lr=0.5, max_iter=4),
    "lbfgs_line_search": lambda p: O.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    "adamw": lambda p: O.AdamW(p, lr=0.01),
    "sam": lambda p: WholeStepSAM(p, lr=0.05, momentum=0.9),
}


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", CLOSURE_OPTIMIZERS)
def test_closures_equal_the_twin(name: str, by_keyword: bool) -> None:
    pair = Pair(CLOSURE_OPTIMIZERS[name])
    for step in range(4):
        losses = []
        for network, optimizer in pair.sides:

            def closure(network=network, optimizer=optimizer, step=step) -> torch.Tensor:
                assert optimizer is not pair.optimizer or is_plain_inside(pair)
                optimizer.zero_grad()
                loss = loss_of(network, step)
                loss.backward()
                return loss

            loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], abs=1e-9)
        assert is_plain(pair.optimizer, pair.model)
        assert pair.gap() < 1e-8


def is_plain_inside(pair: Pair) -> bool:
    """Inside a closure the groups are the plain ones too (state that the optimizer keeps for itself may not be)."""
    held = [id(p) for group in pair.optimizer.param_groups for p in group["params"]]
    return held == [id(p) for p in pair.model.parameters()]


@pytest.mark.parametrize("whole_step", [False, True], ids=["first_step_second_step", "step_with_closure"])
def test_sam_around_a_base_optimizer(whole_step: bool) -> None:
    """By whole steps it perturbs φ; by halves, which the user calls, it perturbs the plain weights, as he sees them."""
    pair = Pair(lambda p: TwoStepSAM(p, O.SGD, lr=0.05, momentum=0.9))
    losses = []
    for step in range(5):
        for network, optimizer in pair.sides if whole_step else pair.sides[1:]:

            def closure(network=network, step=step) -> torch.Tensor:
                loss = loss_of(network, step)
                loss.backward()
                return loss

            losses.append(float(closure().detach()))
            if whole_step:
                optimizer.step(closure)
                optimizer.zero_grad()
            else:
                optimizer.first_step()
                closure()
                optimizer.second_step()
        assert is_plain(pair.optimizer, pair.model)
        assert not whole_step or pair.gap() < 1e-10
    assert losses[-1] < losses[0]


def test_sam_by_halves_moves_the_mean_as_it_would_move_the_weight_at_the_same_gradients() -> None:
    """SGD inside: M <- M - h G, where G is the gradient at the mix of this step, perturbed by rho G0 / |G0|."""
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = TwoStepSAM(model.parameters(), O.SGD, lr=0.1)
    engine = expand_(model, optimizer, MajorityKernels(3))
    phi, mix = engine.forms["weight"].phi, engine.forms["weight"].mix
    mean = torch.stack(list(phi)).mean(0).detach()
    mixed = torch.einsum("k,koi->oi", mix, torch.stack(list(phi))).detach()

    def gradient(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.detach().requires_grad_()
        return torch.autograd.grad(loss_of(lambda x: x @ weight.T), weight)[0]

    first = gradient(mixed)
    expected = mean - 0.1 * gradient(mixed + 0.05 * first / first.norm())
    loss_of(model).backward()
    optimizer.first_step()
    loss_of(model).backward()
    optimizer.second_step()
    torch.testing.assert_close(model.state_dict()["weight"], expected, rtol=1e-12, atol=1e-12)


class Mixed(nn.Module):
    """Majority Kernels as a parametrization: the mix is taken inside every forward, gradients are multiplied by k."""

    def __init__(self, form: TrainingForm) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(kernel.detach().clone() for kernel in form.phi)
        self.mix = form.mix
        for kernel in self.kernels:
            kernel.register_hook(lambda grad: grad * len(self.kernels))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return sum(v * kernel for v, kernel in zip(self.mix, self.kernels, strict=True))


def test_adamw_with_accumulation_and_clipping_equals_a_parametrized_network() -> None:
    model, twin = perceptron(), perceptron()
    optimizer = O.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    engine = expand_(model, optimizer, MajorityKernels(4))
    mixed = {name: Mixed(form) for name, form in engine.forms.items()}
    for name, parametrization in mixed.items():
        parametrize.register_parametrization(twin.get_submodule(name.removesuffix(".weight")), "weight", parametrization)
    leaves = [p for n, p in twin.named_parameters() if not n.endswith("original")]
    twin_optimizer = O.AdamW(leaves, lr=0.01, weight_decay=0.1)
    for step in range(10):
        for name, parametrization in mixed.items():
            parametrization.mix = engine.forms[name].mix
        for micro in range(3):
            ours, theirs = loss_of(model, 3 * step + micro), loss_of(twin, 3 * step + micro)
            assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
            ours.backward()
            theirs.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # of the plain gradient, so the twin is told the factor
        for leaf in leaves:
            leaf.grad.mul_(torch.clamp(0.5 / (norm + 1e-6), max=1.0))
        for each in (optimizer, twin_optimizer):
            each.step()
            each.zero_grad()
    for name, parametrization in mixed.items():
        for kernel, phi in zip(parametrization.kernels, engine.forms[name].phi, strict=True):
            torch.testing.assert_close(phi, kernel, rtol=0, atol=1e-11)
