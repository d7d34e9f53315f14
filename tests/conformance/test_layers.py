"""Layers in unusual places or states: root, frozen, shared, computed weights, lazy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lightning_sop import collapse_, expand_
from lightning_sop.reparam import Rule, make_plan
from tests.conformance.methods import METHODS, Case
from tests.conformance.small import loss_of, small_net, snapshot, train

every_method = pytest.mark.parametrize("case", METHODS, ids=str)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *shape: int) -> None:
    model(torch.ones(*shape, dtype=next(model.parameters()).dtype)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@every_method
@pytest.mark.parametrize(
    ("root", "shape"),
    [(nn.Linear(3, 4), (2, 3)), (nn.Conv2d(2, 4, 3), (1, 2, 4, 4)), (nn.ConvTranspose1d(2, 4, 3), (1, 2, 4))],
    ids=["linear", "conv2d", "conv_transpose1d"],
)
def test_a_model_that_is_one_layer(case: Case, root: nn.Module, shape: tuple[int, ...]) -> None:
    model = copy.deepcopy(root)
    kind = type(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expand_(model, optimizer, case.method)
    for _ in range(2):
        step(model, optimizer, *shape)
    weights = snapshot(model)
    assert list(weights) == ["weight", "bias"]
    assert not torch.equal(weights["weight"], root.weight)
    assert torch.equal(model.eval().weight, weights["weight"])
    collapse_(model)
    assert type(model) is kind
    assert not list(model.children())
    assert torch.equal(model.weight, weights["weight"])
    copy.deepcopy(root).load_state_dict(weights, strict=True)


@every_method
@pytest.mark.parametrize("in_optimizer", [False, True])
def test_frozen_layers_stay_untouched_bit_for_bit(case: Case, in_optimizer: bool) -> None:
    model = small_net()
    model.conv.requires_grad_(False)
    before = model.conv.weight.detach().clone()
    held = model.parameters() if in_optimizer else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)
    expand_(model, optimizer, case.method)
    for _ in range(3):
        assert torch.equal(model.conv.weight, before)
        train(model, optimizer, 1)
        assert torch.equal(model.conv.weight, before)
    assert torch.equal(model.state_dict()["conv.weight"], before)
    assert torch.equal(collapse_(model).conv.weight, before)


@every_method
def test_a_layer_unfrozen_later_is_trained_from_then_on(case: Case) -> None:
    model = small_net()
    model.conv.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = expand_(model, optimizer, case.method)
    train(model, optimizer, 2)
    before = model.conv.weight.detach().clone()
    assert not engine.forms["conv.weight"].built
    model.conv.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.conv.parameters())})
    train(model, optimizer, 1)
    assert engine.forms["conv.weight"].built
    assert torch.allclose(model.state_dict()["conv.weight"], before, atol=0.05)
    assert not torch.equal(model.state_dict()["conv.weight"], before)
    assert torch.equal(collapse_(model).conv.weight, case.reference.collapsed(engine.forms["conv.weight"].phi))


@every_method
def test_a_layer_frozen_later_keeps_the_collapsed_weight(case: Case) -> None:
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    expand_(model, optimizer, case.method)
    train(model, optimizer, 2)
    frozen = snapshot(model)["conv.weight"]
    model.conv.requires_grad_(False)
    train(model, optimizer, 3)
    assert torch.equal(model.state_dict()["conv.weight"], frozen)
    assert torch.equal(collapse_(model).conv.weight, frozen)


@every_method
def test_ties_and_shared_layers_are_collapsed_under_each_name(case: Case) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    engine = expand_(model, optimizer, case.method)
    train(model, optimizer, 2)
    saved = model.state_dict()
    for names in (("embed.weight", "head.weight"), ("first.weight", "second.weight")):
        mean = case.reference.collapsed(next(engine.forms[name] for name in names if name in engine.forms).phi)
        for name in names:
            torch.testing.assert_close(saved[name], mean.detach(), rtol=1e-14, atol=1e-14)
    collapse_(model)
    assert model.head.weight is model.embed.weight
    assert model.first is model.second


def lazy_linear(model: nn.Module) -> None:
    model.conv = nn.LazyConv1d(6, 3)


def masked(model: nn.Module) -> None:
    prune.l1_unstructured(model.conv, "weight", amount=0.3)


COMPUTED = {
    "weight_norm": (lambda m: parametrizations.weight_norm(m.conv), ""),
    "orthogonal": (lambda m: parametrizations.orthogonal(m.conv), ""),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m.conv), ""),
    "old_spectral_norm": (lambda m: spectral_norm(m.conv), "spectral_norm"),
    "prune": (masked, "pruned"),
    "lazy": (lazy_linear, "uninitialized"),
}


@pytest.mark.parametrize("what", COMPUTED)
def test_weights_that_are_not_leaves_are_skipped_with_the_reason(what: str) -> None:
    model = small_net()
    make, reason = COMPUTED[what]
    make(model)
    plan = make_plan(model, [Rule(METHODS[0].method)])
    rows = [row for row in plan.rows if row.name.startswith("conv.")]
    assert rows
    assert all(row.method is None and row.reason for row in rows)
    assert any(reason in row.reason for row in rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    expand_(model, optimizer, METHODS[0].method)
    if what != "lazy":
        train(model, optimizer, 2)
        loss_of(model.eval())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_old_weight_norm_is_skipped_with_the_reason() -> None:
    model = small_net()
    weight_norm(model.conv)
    plan = make_plan(model, [Rule(METHODS[0].method)])
    assert "weight_norm" in plan.row("conv.weight_v").reason
    assert plan.row("conv.weight_g").method is plan.row("conv.weight_v").method is None
