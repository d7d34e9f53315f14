"""A step that raises, in its arithmetic or in its closure, leaves the plain network's optimizer, and training goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils import prune
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_sop import MajorityKernels, collapse_, expand_
from lightning_sop.reparam import Engine
from tests.reparam.nets import adamw, is_plain, loss_of, perceptron


def composed(engine: Engine) -> dict[str, torch.Tensor]:
    """The mixed weights, from the kernels and the present draws."""
    forms = engine.forms.items()
    return {name: torch.einsum("k,koi->oi", form.mix, torch.stack(list(form.phi))).detach() for name, form in forms}


class Interrupted(Optimizer):
    """SGD that is interrupted after it has moved some of its parameters, when told so."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.interruption: BaseException | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            if index == len(parameters) // 2 and self.interruption is not None:
                interruption, self.interruption = self.interruption, None
                raise interruption
            self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
            parameter.add_(parameter.grad, alpha=-0.1)


@pytest.mark.parametrize("interruption", [RuntimeError("no memory"), KeyboardInterrupt()], ids=["error", "ctrl_c"])
@pytest.mark.parametrize("engines", [1, 2])
def test_an_interruption_in_the_arithmetic_leaves_the_plain_groups(interruption: BaseException, engines: int) -> None:
    model = perceptron()
    optimizer = Interrupted(model.parameters())
    parts = [["0", "2", "4"]] if engines == 1 else [["0"], ["2", "4"]]
    running = [expand_(model, optimizer, MajorityKernels(3), include=part) for part in parts]
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        if step == 2:
            optimizer.interruption = interruption
            with pytest.raises(type(interruption)):
                optimizer.step()
        else:
            optimizer.step()
        assert is_plain(optimizer, model)
        for engine in running:
            for name, weight in composed(engine).items():
                torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-13, atol=1e-14)
    assert optimizer.state[model[0].weight]["count"] >= 3
    collapse_(model)
    assert is_plain(optimizer, model)


@pytest.mark.parametrize("interruption", [ValueError("bad batch"), KeyboardInterrupt()], ids=["error", "ctrl_c"])
@pytest.mark.parametrize("call", ["first", "third"])
def test_an_interruption_in_the_closure_leaves_the_plain_groups(interruption: BaseException, call: str) -> None:
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    expand_(model, optimizer, MajorityKernels(3))
    until = 0

    def closure() -> torch.Tensor:
        nonlocal until
        until -= 1
        optimizer.zero_grad()
        loss = loss_of(model)
        if until == 0:
            raise interruption
        loss.backward()
        return loss

    optimizer.step(closure)
    until = 1 if call == "first" else 3
    with pytest.raises(type(interruption)):
        optimizer.step(closure)
    assert is_plain(optimizer, model)
    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    assert is_plain(optimizer, model)
    assert losses[-1] < losses[0]


def test_interrupted_and_repeated_equals_uninterrupted() -> None:
    """A step that was interrupted before it moved anything can be repeated as if nothing had been."""
    weights = []
    for interrupted in (False, True):
        model = perceptron()
        optimizer = adamw(model.parameters())
        expand_(model, optimizer, MajorityKernels(3), seed=0)

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if interrupted and step == 2:
                handle = register_optimizer_step_pre_hook(fail)
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
                handle.remove()
            optimizer.step()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_weight_that_is_gone_is_an_error_for_its_own_optimizer_alone() -> None:
    model, other = perceptron(), perceptron()
    optimizers = [SGD(m.parameters(), lr=0.1) for m in (model, other)]
    expand_(model, optimizers[0], MajorityKernels(3))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    for network, optimizer in zip((model, other), optimizers, strict=True):
        loss_of(network).backward()
        if network is model:
            with pytest.raises(RuntimeError, match=r"0\.weight is no longer a parameter"):
                optimizer.step()
        else:
            optimizer.step()
    with pytest.raises(RuntimeError, match=r"exclude '0\.weight'"):
        model.eval()
