"""Optimizers that know weights by other ways than their param_groups: followed where that is possible, refused otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from lightning_sop import MajorityKernels, expand_
from tests.reparam.nets import loss_of, perceptron


class OwnList(Optimizer):
    """Keeps a list of parameters from its beginning."""

    def __init__(self, model: nn.Module, through_data: bool = False) -> None:
        super().__init__(model.parameters(), {"lr": 0.05})
        self.own = [parameter for group in self.param_groups for parameter in group["params"]]
        self.through_data = through_data

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for parameter in self.own:
            if parameter.grad is not None:
                (parameter.data if self.through_data else parameter).add_(parameter.grad, alpha=-0.05)


class Preconditioned(SGD):
    """Edits gradients of layers, then takes a step of SGD (as K-FAC does)."""

    def __init__(self, model: nn.Module, in_place: bool) -> None:
        super().__init__(model.parameters(), 0.05)
        self.layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        self.in_place = in_place

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for layer in self.layers:
            assert layer.weight.grad is not None
            layer.weight.grad = layer.weight.grad.mul_(0.1) if self.in_place else 0.1 * layer.weight.grad
        super().step()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3, closure: bool = False) -> None:
    for step in range(steps):

        def forward(step: int = step) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if closure:
            optimizer.step(forward)
        else:
            forward()
            optimizer.step()


@pytest.mark.parametrize("through_data", [False, True])
def test_an_optimizer_with_a_list_of_its_own_is_refused(through_data: bool) -> None:
    model = perceptron()
    optimizer = OwnList(model, through_data)
    expand_(model, optimizer, MajorityKernels(1), seed=3)
    message = r"OwnList.step\(\) has written into '0.weight' itself.*exclude '0.weight'"
    with pytest.raises(RuntimeError, match=message):
        train(model, optimizer)


@pytest.fixture
def step_of_sgd() -> Any:
    """Torch runs the hooks of a class's step from its first instance on."""
    return SGD(nn.Linear(1, 1).parameters(), 0.1)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("closure", [True, False])
def test_gradients_that_are_edited_before_the_step_of_a_base_class_count(
    in_place: bool, closure: bool, step_of_sgd: Optimizer
) -> None:
    ours, plain = perceptron(), perceptron()
    optimizers = Preconditioned(ours, in_place), Preconditioned(plain, in_place)
    expand_(ours, optimizers[0], MajorityKernels(1), seed=3)
    for model, optimizer in zip((ours, plain), optimizers, strict=True):
        train(model, optimizer, closure=closure)
    for left, right in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right)


def test_gradients_that_are_edited_unseen_are_refused(monkeypatch: pytest.MonkeyPatch, step_of_sgd: Optimizer) -> None:
    monkeypatch.setattr(SGD, "step", SGD.step.__wrapped__)  # as if there never was an SGD: its step runs no hooks
    model = perceptron()
    optimizer = Preconditioned(model, in_place=True)
    expand_(model, optimizer, MajorityKernels(2), seed=3)
    with pytest.raises(RuntimeError, match=r"Preconditioned.step\(\) has edited the gradient of '0.weight' itself"):
        train(model, optimizer)


def test_weights_that_are_not_numbers_are_nobodys_fault() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), 0.1)
    expand_(model, optimizer, MajorityKernels(2), seed=3)
    for _ in range(5):
        (loss_of(model) * float("nan")).backward()
        optimizer.step()
    assert model[0].weight.isnan().all()
