"""Every method on every architecture: what is converted, training against the autograd twin, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_sop import collapse_, expand_
from lightning_sop.reparam import Engine
from tests.conformance.architecture import Architecture
from tests.conformance.architectures import ARCHITECTURES
from tests.conformance.methods import METHODS, Case
from tests.conformance.twin import Twin, train_both

ROUNDING = 1e-9
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
every_method = pytest.mark.parametrize("case", METHODS, ids=str)


def adamw(parameters) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.1)


def momentum(parameters) -> Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.01, nesterov=True)


def expanded(
    architecture: Architecture, case: Case, make: Callable = adamw
) -> tuple[nn.Module, Engine, Optimizer, nn.Module]:
    """The network under test with its engine and optimizer, and a plain copy from before."""
    model = architecture.model().train()
    plain = copy.deepcopy(model)
    optimizer = make(model.parameters())
    return model, expand_(model, optimizer, case.method, seed=5), optimizer, plain


@every_method
@every_architecture
def test_converts_what_is_expected_and_shows_the_plain_model(architecture: Architecture, case: Case) -> None:
    model, engine, _, plain = expanded(architecture, case)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    converted = {name for row, _ in engine.plan.converted for name in row.names}
    assert converted == {name for name in names if not architecture.stays_plain(name)}
    once = {id(p): p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name in converted}
    assert (sum(once.values()), sum(p.numel() for p in model.parameters())) == architecture.share
    assert engine.plan.numel[0] == architecture.share[1]
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    ours, theirs = model.state_dict(), plain.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]
    assert ours._metadata == theirs._metadata
    with torch.no_grad():
        torch.testing.assert_close(architecture.output(model.eval()), architecture.output(plain.eval()), rtol=0, atol=1e-12)


@every_method
@every_architecture
def test_twenty_steps_equal_the_autograd_twin(architecture: Architecture, case: Case) -> None:
    compare_with_twin(architecture, case, adamw)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if "conv" in a.name or "tied" in a.name], ids=str)
def test_twenty_momentum_steps_equal_the_autograd_twin(architecture: Architecture) -> None:
    compare_with_twin(architecture, METHODS[0], momentum)


def compare_with_twin(architecture: Architecture, case: Case, make: Callable) -> None:
    model, engine, optimizer, plain = expanded(architecture, case, make)
    twin = Twin(plain, engine, case.reference)
    losses = train_both(model, twin, (make(twin.parameters()), optimizer), architecture.loss_at, steps=20)
    for step, (theirs, ours) in enumerate(losses):
        assert ours == pytest.approx(theirs, abs=ROUNDING, rel=ROUNDING), f"step {step}"
    assert losses[0] != losses[-1]
    assert twin.gap(model) < ROUNDING
    deployed = twin.collapsed().eval()
    with torch.no_grad():
        torch.testing.assert_close(architecture.output(model.eval()), architecture.output(deployed), rtol=0, atol=1e-8)


@every_method
@every_architecture
def test_collapses_to_the_plain_model(architecture: Architecture, case: Case) -> None:
    model, _, optimizer, plain = expanded(architecture, case)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties = storages(plain)
    for step in range(3):
        optimizer.zero_grad()
        architecture.loss_at(model, step).backward()
        optimizer.step()
    mixed = {name: p.detach().clone() for name, p in parameters.items()}
    saved = copy.deepcopy(model.state_dict())  # the layers hold mixes now
    assert any(not torch.equal(mixed[name], saved[name]) for name in mixed), "nothing was mixed"
    model.eval()
    assert_same_tensors(saved, model.state_dict(keep_vars=True))
    with torch.no_grad():
        output = architecture.output(model)
    plain.load_state_dict(saved, strict=True)
    with torch.no_grad():
        assert torch.equal(architecture.output(plain.eval()), output)
    assert collapse_(model) is model
    assert_same_tensors(saved, model.state_dict())
    assert storages(model) == ties
    assert [str(m) for m in model.modules()] == [str(m) for m in plain.modules()]
    assert all(p is parameters[name] for name, p in model.named_parameters(remove_duplicate=False))
    assert set(optimizer.state) <= set(model.parameters())


def assert_same_tensors(ours, theirs) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def storages(model: nn.Module) -> list[list[str]]:
    """Names grouped by the memory they share."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.data_ptr(), []).append(name)
    return list(groups.values())
