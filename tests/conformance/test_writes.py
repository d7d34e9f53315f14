"""Weights that somebody else writes move the deployed weight by as much; they never vanish."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_sop import collapse_, expand_
from tests.conformance.methods import METHODS, Case
from tests.conformance.small import loss_of, small_net, snapshot, train

every_method = pytest.mark.parametrize("case", METHODS, ids=str)
NAMES = ("conv.weight", "first.weight", "embed.weight")


def in_place(model: nn.Module, delta: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in delta.items():
            model.get_parameter(name).add_(value)


def through_data(model: nn.Module, delta: dict[str, Tensor]) -> None:
    for name, value in delta.items():
        model.get_parameter(name).data.add_(value)


def new_data(model: nn.Module, delta: dict[str, Tensor]) -> None:
    for name, value in delta.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data + value


def as_a_vector(model: nn.Module, delta: dict[str, Tensor]) -> None:
    """As libraries do that treat a network as one long vector."""
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    moved = [delta.get(name, torch.zeros_like(p)).flatten() for name, p in model.named_parameters()]
    nn.utils.vector_to_parameters(vector + torch.cat(moved), model.parameters())


def loaded(model: nn.Module, delta: dict[str, Tensor]) -> None:
    state = model.state_dict()
    for name, value in delta.items():
        state[name] = state[name] + value
    state["head.weight"] = state["embed.weight"]
    state["second.weight"] = state["first.weight"]
    model.load_state_dict(state)


WRITERS: list[Callable[[nn.Module, dict[str, Tensor]], None]] = [in_place, through_data, new_data, as_a_vector, loaded]


@every_method
@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_a_write_moves_the_deployed_weight(case: Case, write: Callable, training: bool) -> None:
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expand_(model, optimizer, case.method)
    train(model, optimizer, 2)
    model.train(training)
    before = snapshot(model)
    delta = {name: torch.full_like(before[name], 0.25) for name in NAMES}
    write(model, delta)
    for name in NAMES:
        torch.testing.assert_close(model.state_dict()[name], before[name] + delta[name], rtol=1e-12, atol=1e-12)
    model.train()
    loss_of(model).backward()
    model.eval()
    for name in NAMES:
        torch.testing.assert_close(model.get_parameter(name).data, before[name] + delta[name], rtol=1e-12, atol=1e-12)
    after = snapshot(model)
    model.train()
    train(model, optimizer, 2)
    collapse_(model)
    for name in NAMES:
        assert 0 < float((model.get_parameter(name) - after[name]).detach().abs().max()) < 0.1, "training goes on from there"


@every_method
def test_a_plain_checkpoint_is_loaded_to_the_last_bit(case: Case) -> None:
    model, other = small_net(), small_net()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    expand_(model, optimizer, case.method)
    train(model, optimizer, 2)
    model.load_state_dict(other.state_dict(), strict=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-14, atol=1e-14)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model), loss_of(other.eval()), rtol=1e-6, atol=1e-6)


@every_method
def test_a_write_between_forward_and_backward_raises(case: Case) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    expand_(model, optimizer, case.method)
    loss = loss_of(model)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_method
def test_a_step_between_forward_and_backward_raises(case: Case) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    expand_(model, optimizer, case.method)
    late = loss_of(model)
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@every_method
@pytest.mark.parametrize("inference", [False, True])
def test_evaluation_between_forward_and_backward_changes_no_gradient(case: Case, inference: bool) -> None:
    gradients = []
    for evaluates in (False, True):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        expand_(model, optimizer, case.method, seed=2)
        train(model, optimizer, 1)
        optimizer.zero_grad()
        loss = loss_of(model)
        if evaluates:
            with torch.inference_mode(inference), torch.set_grad_enabled(False):
                model.eval()
                evaluated = loss_of(model)
                model.state_dict()
                model.train()
            assert not torch.equal(evaluated, loss.detach())
        loss.backward()
        optimizer.step()
        gradients.append([p.grad for p in model.parameters()] + list(snapshot(model).values()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_method
def test_a_write_during_evaluation_between_forward_and_backward_raises(case: Case) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    expand_(model, optimizer, case.method)
    loss = loss_of(model)
    model.eval()
    with torch.no_grad():
        model.conv.weight.mul_(2)
    model.train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
