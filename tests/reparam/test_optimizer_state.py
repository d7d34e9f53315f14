"""The optimizer's state outside a step: saved, loaded, reset, and left behind after collapsing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_sop import MajorityKernels, collapse_, expand_
from tests.reparam.nets import Pair, adamw, loss_of, perceptron


def test_a_saved_optimizer_state_continues_in_a_plain_run() -> None:
    model = perceptron()
    optimizer = adamw(model.parameters())
    expand_(model, optimizer, MajorityKernels(3))
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    plain = perceptron()
    plain.load_state_dict(saved[0])
    theirs = adamw(plain.parameters())
    theirs.load_state_dict(saved[1])
    for parameter in plain.parameters():
        assert theirs.state[parameter]["exp_avg"].shape == parameter.shape
        assert float(theirs.state[parameter]["step"]) == 3
    loss_of(plain).backward()
    theirs.step()


def test_the_saved_momentum_is_that_of_the_mean_kernel() -> None:
    """SGD's momentum is linear in the gradient, so the mean over the kernels is what moves their mean."""
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    expand_(model, optimizer, MajorityKernels(3))
    momentum = torch.zeros_like(model[0].weight)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        momentum = 0.9 * momentum + model[0].weight.grad
        optimizer.step()
    saved = optimizer.state_dict()["state"][0]["momentum_buffer"]
    torch.testing.assert_close(saved, momentum, rtol=1e-12, atol=1e-14)


def test_a_plain_optimizer_state_gives_every_kernel_the_moments_of_its_weight() -> None:
    plain = perceptron()
    theirs = adamw(plain.parameters())
    loss_of(plain).backward()
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    pair = Pair(adamw)
    pair.optimizer.load_state_dict(saved)
    states = iter(saved["state"].values())
    for name, parameter in pair.twin.model.named_parameters():
        state = next(states)
        for leaf in pair.twin.leaves.get(name, [parameter]):
            pair.twin_optimizer.state[leaf] = copy.deepcopy(state)
    for step in range(3):
        for network, optimizer in pair.sides:
            optimizer.zero_grad()
            loss_of(network, step).backward()
        for _, optimizer in pair.sides:
            optimizer.step()
    assert pair.gap() < 1e-11


@pytest.mark.parametrize("reset", ["clear", "defaultdict"])
def test_an_optimizer_state_that_the_user_resets_is_reset_for_the_kernels(reset: str) -> None:
    pair = Pair(adamw)
    for step in range(5):
        if step == 3:
            for _, optimizer in pair.sides:
                if reset == "clear":
                    optimizer.state.clear()
                else:
                    optimizer.state = type(optimizer.state)(dict)
        for network, optimizer in pair.sides:
            optimizer.zero_grad()
            loss_of(network, step).backward()
        for _, optimizer in pair.sides:
            optimizer.step()
    assert pair.gap() < 1e-11


def test_collapsing_leaves_an_optimizer_that_trains_on() -> None:
    model = perceptron()
    optimizer = adamw(model.parameters())
    expand_(model, optimizer, MajorityKernels(3))
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    plain = copy.deepcopy(collapse_(model))
    theirs = adamw(plain.parameters())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, each in ((model, optimizer), (plain, theirs)):
        each.zero_grad()
        loss_of(network, 7).backward()
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not any(isinstance(m, nn.Module) and list(m.children()) for m in model)


def test_lbfgs_may_have_stepped_before_and_goes_on_afterwards() -> None:
    """It counts its parameters once, and keeps vectors of that length."""
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach())]
    expand_(model, optimizer, MajorityKernels(3, init="spread"))
    for _ in range(3):
        optimizer.step(closure)
    collapse_(model)
    losses += [float(optimizer.step(closure).detach()) for _ in range(2)]
    assert losses[2] < losses[1] < losses[0]
