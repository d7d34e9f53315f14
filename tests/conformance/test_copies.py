"""Copies, pickles, other dtypes: what comes out is the network to deploy."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_sop import collapse_, expand_
from tests.conformance.methods import METHODS, Case
from tests.conformance.small import batch, small_net, snapshot, train

every_method = pytest.mark.parametrize("case", METHODS, ids=str)


def trained(case: Case, dtype: torch.dtype = torch.float64):
    model = small_net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = expand_(model, optimizer, case.method, seed=1)
    train(model, optimizer, 3)
    return model, optimizer, engine


def assert_deploys(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """The model's weights are these, and it does what a plain model with them does."""
    plain = small_net(next(iter(weights.values())).dtype)
    plain.load_state_dict(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    with torch.no_grad():
        assert torch.equal(model.eval()(batch()), plain.eval()(batch()))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@every_method
def test_deepcopy_is_the_network_to_deploy_and_independent(case: Case) -> None:
    model, optimizer, _ = trained(case)
    weights = snapshot(model)
    mixed = model.conv.weight.detach().clone()
    twin = copy.deepcopy(model)
    assert torch.equal(model.conv.weight, mixed)
    assert twin.head.weight is twin.embed.weight
    assert twin.first is twin.second
    assert torch.equal(twin.conv.weight, weights["conv.weight"])  # without any call of eval()
    train(model, optimizer, 2)
    assert_deploys(twin, weights)
    assert_deploys(collapse_(twin), weights)
    train(model, optimizer, 2)  # the original is still trained, collapse_ of the copy or not
    assert not torch.equal(model.state_dict()["conv.weight"], weights["conv.weight"])


@every_method
def test_training_goes_on_as_if_nobody_had_copied(case: Case) -> None:
    losses = []
    for copies in (False, True):
        model, optimizer, _ = trained(case)
        if copies:
            copy.deepcopy(model), pickle.dumps(model), copy.deepcopy(optimizer), model.state_dict()
        losses.append(train(model, optimizer, 3))
    assert losses[0] == losses[1]


@every_method
def test_a_copy_of_one_layer(case: Case) -> None:
    model, _, _ = trained(case)
    weights = snapshot(model)
    assert torch.equal(copy.deepcopy(model.conv).weight, weights["conv.weight"])
    assert torch.equal(copy.deepcopy(model.head).weight, weights["head.weight"])
    assert torch.equal(copy.deepcopy(model.embed).weight, weights["embed.weight"])


@every_method
@pytest.mark.parametrize("save", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_pickled(case: Case, save) -> None:
    model, _, _ = trained(case)
    weights = snapshot(model)
    if save is None:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    else:
        loaded = pickle.loads(save(model))
    assert loaded.head.weight is loaded.embed.weight
    assert_deploys(loaded, weights)
    assert_deploys(collapse_(loaded), weights)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    model = small_net(dtype)
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    engine = expand_(model, optimizer, case.method)
    eps = torch.finfo(dtype).eps
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        # Kernels deviate by a few standard deviations, and each is rounded on its own.
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=8 * eps * max(1.0, float(before[name].abs().max())))
    losses = train(model, optimizer, 25)
    assert losses[-1] < losses[0]
    assert all(phi.dtype == dtype for form in engine.forms.values() for phi in form.phi)
    weights = snapshot(model)
    for form in engine.forms.values():
        exact = case.reference.collapsed([phi.double() for phi in form.phi])
        torch.testing.assert_close(weights[form.site.name].double(), exact, rtol=eps, atol=eps)
    assert_deploys(collapse_(model), weights)


@every_method
def test_converted_to_another_dtype_while_training(case: Case) -> None:
    model, optimizer, engine = trained(case, torch.float32)
    weights = snapshot(model)
    model.double()
    assert all(phi.dtype == torch.float64 for form in engine.forms.values() for phi in form.phi)
    torch.testing.assert_close(model.state_dict()["conv.weight"], weights["conv.weight"].double(), rtol=1e-6, atol=1e-6)
    optimizer.state.clear()
    train(model, optimizer, 2)
    assert_deploys(collapse_(model), snapshot(model))
