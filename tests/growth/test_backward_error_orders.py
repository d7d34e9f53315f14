"""The orders of backward error analysis, by which the growth schedule is reasoned: T1-T5, T9, T11.

A small tanh network with three batches in float64. Flows are integrated by Runge-Kutta steps much finer than h, the added
terms come from autograd. An error of order p falls by 2^p where h is halved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_sop.growth.backward_error import lie_bracket, order_swap, predicted_decrease

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")  # torch.func.jvp's own
RATES = (0.04, 0.02, 0.01)
SIZES = (3, 5, 2)
Loss = Callable[[Tensor], Tensor]
Vector = Callable[[Tensor], Tensor]


def start() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    count = SIZES[1] * (SIZES[0] + 1) + SIZES[2] * (SIZES[1] + 1)
    return 0.8 * torch.randn(count, dtype=torch.float64, generator=generator)


def losses() -> list[Loss]:
    """The squared error on each of three batches, of all parameters in one vector; a sixteenth of it, so that h is small."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(3, 8, SIZES[0], dtype=torch.float64, generator=generator)
    targets = torch.randn(3, 8, SIZES[2], dtype=torch.float64, generator=generator)

    def loss(w: Tensor, batch: int) -> Tensor:
        n, m, k = SIZES
        first, bias, second, last = w.split([m * n, m, k * m, k])
        hidden = torch.tanh(inputs[batch] @ first.view(m, n).T + bias)
        return (hidden @ second.view(k, m).T + last - targets[batch]).square().mean() / 16

    return [lambda w, batch=batch: loss(w, batch) for batch in range(3)]


def mean(parts: Sequence[Loss]) -> Loss:
    return lambda w: torch.stack([part(w) for part in parts]).mean()


def gradient(loss: Loss) -> Vector:
    return torch.func.grad(loss)


def hessian_times(loss: Loss, w: Tensor, vector: Tensor) -> Tensor:
    return torch.func.jvp(gradient(loss), (w,), (vector,))[1]


def regularized(loss: Loss, strength: float) -> Vector:
    """The gradient of L + strength ‖∇L‖²."""

    def field(w: Tensor) -> Tensor:
        g = gradient(loss)(w)
        return g + 2 * strength * hessian_times(loss, w, g)

    return field


def flow(field: Vector, w: Tensor, time: float, steps: int = 4) -> Tensor:
    """The solution of w' = -field(w), by the classical Runge-Kutta method."""
    h = time / steps
    for _ in range(steps):
        k1 = -field(w)
        k2 = -field(w + h / 2 * k1)
        k3 = -field(w + h / 2 * k2)
        k4 = -field(w + h * k3)
        w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return w


def is_order(error: Callable[[float], float], order: float, within: float = 0.1) -> bool:
    errors = [error(h) for h in RATES]
    found = [math.log2(wide / fine) for wide, fine in itertools.pairwise(errors)]
    return found == pytest.approx([order] * len(found), abs=within)


@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "rates_by_coordinate"])
def test_t1_a_step_follows_the_flow_of_the_modified_loss(preconditioned: bool) -> None:
    """Per step: order 2 of the gradient flow, 3 with the added term (h/4) gᵀDg, D the rates of the coordinates."""
    loss, w = mean(losses()), start()
    rates = torch.linspace(0.5, 2, len(w), dtype=torch.float64) if preconditioned else torch.ones_like(w)

    def error(h: float, added: float) -> float:
        def field(x: Tensor) -> Tensor:
            g = gradient(loss)(x)
            return rates * (g + added * h / 2 * hessian_times(loss, x, rates * g))

        return float((w - h * rates * gradient(loss)(w) - flow(field, w, h)).norm())

    assert is_order(lambda h: error(h, 0), 2)
    assert is_order(lambda h: error(h, 1), 3)


def test_t1_the_error_of_many_steps_is_one_order_lower() -> None:
    loss, w = mean(losses()), start()

    def error(h: float, strength: float) -> float:
        x, steps = w, round(0.4 / h)
        for _ in range(steps):
            x = x - h * gradient(loss)(x)
        return float((x - flow(regularized(loss, strength), w, 0.4, 10)).norm())

    assert is_order(lambda h: error(h, 0), 1)
    assert is_order(lambda h: error(h, h / 4), 2)


def test_t2_two_losses_in_turn_follow_the_bracket_with_its_sign() -> None:
    """(h₁h₂/2)(H₂g₁ - H₁g₂) with a plus: order 3; without it or with a minus: order 2."""
    (first, second, _), w = losses(), start()

    def error(h: float, sign: int) -> float:
        h1, h2 = h, 0.7 * h

        def field(x: Tensor) -> Tensor:
            g1, g2 = gradient(first)(x), gradient(second)(x)
            bracket = hessian_times(second, x, g1) - hessian_times(first, x, g2)
            modified = h1 * regularized(first, h1 / 4)(x) + h2 * regularized(second, h2 / 4)(x)
            return modified - sign * h1 * h2 / 2 * bracket

        x = w - h1 * gradient(first)(w)
        x = x - h2 * gradient(second)(x)
        return float((x - flow(field, w, 1.0)).norm())

    assert is_order(lambda h: error(h, 1), 3)
    assert is_order(lambda h: error(h, -1), 2)
    assert is_order(lambda h: error(h, 0), 2)


@pytest.mark.parametrize("case", ["two_losses", "growth"])
def test_t3_swapping_two_steps_measures_the_bracket(case: str) -> None:
    """h₁h₂[X, Y] up to order 3; for a step within a subspace and a step on the whole, h₁h₂(HP - PH)g."""
    (first, second, _), w = losses(), start()
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(len(w), 12, dtype=torch.float64, generator=generator))[0]
    if case == "growth":
        x, y = (lambda v: basis @ (basis.T @ gradient(first)(v))), gradient(first)
        hessian, projector = torch.func.hessian(first)(w), basis @ basis.T
        expected = (hessian @ projector - projector @ hessian) @ gradient(first)(w)
    else:
        x, y = gradient(first), gradient(second)
        expected = torch.func.hessian(second)(w) @ x(w) - torch.func.hessian(first)(w) @ y(w)
    found = lie_bracket(lambda at: {"w": x(at["w"])}, lambda at: {"w": y(at["w"])}, {"w": w})
    torch.testing.assert_close(found, {"w": expected}, rtol=1e-12, atol=1e-12)

    def error(h: float) -> float:
        swapped = order_swap(
            lambda at: {"w": at["w"] - h * x(at["w"])}, lambda at: {"w": at["w"] - 0.7 * h * y(at["w"])}, {"w": w}
        )
        return float((swapped["w"] - 0.7 * h * h * expected).norm())

    assert is_order(error, 3, within=0.05)


def test_t4_random_reshuffling_follows_the_mean_of_the_batches_norms() -> None:
    """The mean over all 3! orders of an epoch: L + (h/4m) Σ‖g_j‖² to order 3, with (h/4)‖∇L‖² only to order 2."""
    batches, w = losses(), start()

    def error(h: float, field: Vector) -> float:
        ends = []
        for order in itertools.permutations(batches):
            x = w
            for loss in order:
                x = x - h * gradient(loss)(x)
            ends.append(x)
        return float((torch.stack(ends).mean(0) - flow(field, w, 3 * h)).norm())

    def by_batch(h: float) -> Vector:
        return lambda x: torch.stack([regularized(loss, h / 4)(x) for loss in batches]).mean(0)

    assert is_order(lambda h: error(h, by_batch(h)), 3)
    assert is_order(lambda h: error(h, regularized(mean(batches), h / 4)), 2)


def test_t5_heavy_ball_regularizes_by_the_square_of_its_horizon() -> None:
    """Momentum β: time h/(1-β) on L + h(1+β)/(4(1-β)²) ‖g‖², to global order 2; without the term to order 1."""
    loss, w, beta, time = mean(losses()), start(), 0.5, 2.0

    def error(h: float, added: float) -> float:
        parameter = w.clone().requires_grad_()
        optimizer = torch.optim.SGD([parameter], lr=h, momentum=beta)
        # In its steady state: from rest it would first fall behind by O(h).
        optimizer.state[parameter]["momentum_buffer"] = gradient(loss)(w) / (1 - beta)
        for _ in range(round(time / h)):
            optimizer.zero_grad()
            loss(parameter).backward()
            optimizer.step()
        field = regularized(loss, added * h * (1 + beta) / (4 * (1 - beta) ** 2))
        return float((parameter.detach() - flow(field, w, time / (1 - beta), 40)).norm())

    assert is_order(lambda h: error(h, 1), 2)
    assert is_order(lambda h: error(h, 0), 1)


@pytest.mark.parametrize(("sequence", "order"), [("ABAB", 2), ("ABBA", 3)])
def test_t9_a_palindrome_of_losses_has_no_bracket(sequence: str, order: int) -> None:
    """Against the flow of the modified losses without the bracket."""
    (first, second, _), w = losses(), start()

    def error(h: float) -> float:
        x = w
        for letter in sequence:
            x = x - h * gradient(first if letter == "A" else second)(x)
        both = flow(lambda v: regularized(first, h / 4)(v) + regularized(second, h / 4)(v), w, 2 * h)
        return float((x - both).norm())

    assert is_order(error, order)


def test_t11_gradients_before_and_after_predict_the_decrease() -> None:
    """(h/2)(g·g + g·g₊) to order 3, h‖g‖² to order 2."""
    loss, w = mean(losses()), start()
    g = gradient(loss)(w)

    def error(h: float, second: bool) -> float:
        after = gradient(loss)(w - h * g)
        predicted = predicted_decrease(h, {"w": g}, {"w": after}) if second else h * float(g @ g)
        return abs(float(loss(w) - loss(w - h * g)) - predicted)

    assert is_order(lambda h: error(h, True), 3)
    assert is_order(lambda h: error(h, False), 2)
