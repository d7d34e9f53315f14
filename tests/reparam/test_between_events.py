"""eval(), step(), edits of the optimizer's state and copies, in orders that users choose."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sop import MajorityKernels, collapse_, expand_


def problem(momentum: float = 0.9) -> tuple[nn.Sequential, torch.optim.Optimizer, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    engine = expand_(model, optimizer, MajorityKernels(3), seed=5)
    return model, optimizer, engine, torch.randn(4, 6, dtype=torch.float64)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).square().mean()


def kernels(engine: Any) -> list[Tensor]:
    return [phi.detach().clone() for form in engine.forms.values() for phi in form.phi]


def test_eval_between_backward_and_step_changes_nothing() -> None:
    results = []
    for early_eval in (False, True):
        model, optimizer, engine, inputs = problem()
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
            if early_eval:
                model.eval()
            optimizer.step()
            model.train()
        results.append(kernels(engine))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_a_network_in_eval_mode_stays_collapsed_through_a_step() -> None:
    model, optimizer, engine, inputs = problem()
    model.eval()
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        before = kernels(engine)
        gradient = model[0].weight.grad.clone()
        optimizer.step()
        form = engine.forms["0.weight"]
        torch.testing.assert_close(model[0].weight.detach(), torch.stack(list(form.phi)).mean(0).detach())
    # forward was at the mean, so each kernel has the same gradient: the plain one
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    for old, new in zip(before[:3], form.phi, strict=True):
        torch.testing.assert_close(old - new, 0.1 * momentum)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("how", ["in place", "by key"])
def test_edits_of_a_weights_optimizer_state_reach_the_kernels(how: str) -> None:
    model, optimizer, engine, inputs = problem()
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
    for state in optimizer.state.values():
        if how == "in place":
            state["momentum_buffer"].zero_()
        else:
            state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])
    before = kernels(engine)
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, kernels(engine), strict=True))


def test_looking_at_the_state_changes_nothing() -> None:
    results = []
    for look in (False, True):
        model, optimizer, engine, inputs = problem()
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
            optimizer.step()
            if look:
                assert all(state["momentum_buffer"].shape == p.shape for p, state in optimizer.state.items())
        results.append(kernels(engine))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_hold_the_collapsed_weights_in_train_mode_too(copied: Any) -> None:
    model, optimizer, engine, inputs = problem()
    loss_of(model, inputs).backward()
    optimizer.step()
    twin = copied(model)
    expected = torch.stack(list(engine.forms["0.weight"].phi)).mean(0).detach()
    torch.testing.assert_close(twin[0].weight.detach(), expected)
    assert not torch.allclose(model[0].weight, expected)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    loss_of(twin, inputs).backward()
    plain.step()  # trained on as a plain model: its forms are not live
    state = twin.state_dict()
    assert torch.equal(state["0.weight"], twin[0].weight)
    assert [n for n, _ in collapse_(twin).named_modules()] == ["", "0", "1", "2"]


def test_a_typo_in_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the layer type 'Conv1D ' matches no layer.*Linear"):
        expand_(model, optimizer, layers=["Linear", "Conv1D "])


def test_a_weight_of_another_shape_is_refused_by_name() -> None:
    model, optimizer, _, _ = problem()
    model[2].weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"2\.weight has become of shape \(4, 8\)"):
        optimizer.step()


def test_state_dict_in_inference_mode_is_of_ordinary_tensors() -> None:
    model, _, _, _ = problem()
    with torch.inference_mode():
        state = model.state_dict()
    assert not any(value.is_inference() for value in state.values())
    assert not any(value.requires_grad for value in state.values())


def test_step_is_the_optimizers_own_again_after_collapse() -> None:
    model, optimizer, _, _ = problem()
    assert "step" in optimizer.__dict__
    collapse_(model)
    assert "step" not in optimizer.__dict__
