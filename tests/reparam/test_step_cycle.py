"""Around a step: hooks, gradient scaling, schedulers, several optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from lightning_sop import MajorityKernels, collapse_, expand_
from tests.reparam.nets import Pair, adamw, is_plain, loss_of, perceptron


def test_user_hooks_see_the_plain_network_and_its_gradients_whenever_they_were_registered() -> None:
    model = perceptron()
    optimizer = adamw(model.parameters())
    seen: list[str] = []

    def watch(name: str):
        def hook(*_: Any) -> None:
            assert is_plain(optimizer, model)
            assert all(p.grad is not None for p in model.parameters())
            seen.append(name)

        return hook

    optimizer.register_step_pre_hook(watch("early before"))
    optimizer.register_step_post_hook(watch("early after"))
    expand_(model, optimizer, MajorityKernels(3))
    optimizer.register_step_pre_hook(watch("late before"))
    optimizer.register_step_post_hook(watch("late after"))
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
    assert seen == ["early before", "late before", "early after", "late after"] * 2


def test_a_gradient_that_a_hook_edits_is_the_one_that_is_pulled_back() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    expand_(model, optimizer, MajorityKernels(3))
    before = model.state_dict()["0.weight"].clone()

    def fill(*_: Any) -> None:
        model[0].weight.grad.fill_(1.0)

    optimizer.register_step_pre_hook(fill)
    loss_of(model).backward()
    optimizer.step()
    torch.testing.assert_close(model.state_dict()["0.weight"], before - 0.1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_draws_and_moves_nothing(fused: bool) -> None:
    model = perceptron(dtype=torch.float32)
    optimizer = adamw(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    engine = expand_(model, optimizer, MajorityKernels(3))
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, torch.float32)).backward()
        overflows = step in (0, 3)
        if overflows:
            model[0].weight.grad[0, 0] = torch.inf
        before = {n: ([p.clone() for p in f.phi], f.mix) for n, f in engine.forms.items()}
        weights = [p.detach().clone() for p in model.parameters()]
        generator = engine.generator.get_state()
        scaler.step(optimizer)
        scaler.update()
        assert is_plain(optimizer, model)
        assert torch.equal(engine.generator.get_state(), generator) == overflows
        if overflows:
            assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        for name, form in engine.forms.items():
            phi, mix = before[name]
            assert all(torch.equal(a, b) for a, b in zip(form.phi, phi, strict=True)) == overflows
            assert torch.equal(form.mix, mix) == overflows


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_equal_the_twin(fused: bool) -> None:
    pair = Pair(lambda p: adamw(p, fused=fused))
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for step in range(5):
        for network, optimizer in pair.sides:
            optimizer.zero_grad()
            scalers[network is pair.model].scale(loss_of(network, step)).backward()
        for network, optimizer in pair.sides:
            scalers[network is pair.model].step(optimizer)
            scalers[network is pair.model].update()
    assert pair.gap() < 1e-11


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["cosine", "one_cycle"])
def test_learning_rate_schedulers_warn_of_nothing_and_act(order: str, kind: str) -> None:
    def scheduler_for(optimizer: Optimizer) -> Any:
        return CosineAnnealingLR(optimizer, 5) if kind == "cosine" else OneCycleLR(optimizer, 0.1, total_steps=8)

    model, plain = perceptron(), perceptron()
    ours, theirs = (SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain))
    schedulers = [scheduler_for(theirs)]
    if order == "before":
        schedulers.append(scheduler_for(ours))
    expand_(model, ours, MajorityKernels(3))
    if order == "after":
        schedulers.append(scheduler_for(ours))
    for step in range(6):
        for network, optimizer in ((model, ours), (plain, theirs)):
            loss_of(network, step).backward()
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr() == [ours.param_groups[0]["lr"]]


def test_parameters_without_a_gradient_are_left_alone() -> None:
    pair = Pair(adamw)
    for step in range(3):
        for network, optimizer in pair.sides:
            optimizer.zero_grad()
            loss_of(network, step).backward()
        if step == 1:
            pair.model[0].weight.grad = None
            for leaf in pair.twin.leaves["0.weight"]:
                leaf.grad = None
        for _, optimizer in pair.sides:
            optimizer.step()
    assert pair.gap() < 1e-11


def test_two_optimizers_step_in_turn() -> None:
    pair = Pair(lambda p: adamw(list(p)))
    collapse_(pair.model)
    halves = pair.model[0], pair.model[2:]
    optimizers = [adamw(half.parameters()) for half in halves]
    engine = expand_(pair.model, optimizers, MajorityKernels(3))
    mixes = {name: form.mix for name, form in engine.forms.items()}
    loss_of(pair.model).backward()
    optimizers[1].step()
    assert torch.equal(engine.forms["0.weight"].mix, mixes["0.weight"]), "the other optimizer's weights are not drawn anew"
    assert not torch.equal(engine.forms["2.weight"].mix, mixes["2.weight"])
    assert all(is_plain(o, half) for o, half in zip(optimizers, halves, strict=True))
