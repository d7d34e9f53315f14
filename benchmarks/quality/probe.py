"""Gradients, and curvature along kernel differences, in the midst of a run.

For mixes v with A = k E‖v‖², the mean loss over mixes is above the loss of the mean kernel by ½ tr(HC) at second order,
with C the covariance of W(v). For SGD at a small rate h this is (h/4)(A - 1) E‖g‖² in the steady state, g being the gradient
of a batch at the mean kernel: what is implicitly penalized, A - 1 times what the plain network penalizes. Where the
optimizer divides by the root of the second moment, the same algebra has Σ h_j g_j² in place of h ‖g‖², with each weight's
own rate h_j; and with decoupled weight decay λ it is ½ tr((H + diag(λ h / h_j)) C) that has this value. The rate falls
during training and the mix is annealed, and the kernels' differences follow both with a delay that is in no formula here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import update_bn

from lightning_sop import MajorityKernels, SimulatedOverparam
from lightning_sop.callbacks._plain_copy import plain_copy
from lightning_sop.deploy.replay import isolated_random_state
from lightning_sop.dynamics.kernels import predicted_amplification

Loss = Callable[[nn.Module, Any], Tensor]
Direction = Sequence[Tensor]
BATCHES, DRAWS, PROBES = 8, 8, 12


def cross_entropy(network: nn.Module, batch: Any) -> Tensor:
    """Of the zoo's networks: classes on the last axis."""
    logits = network(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


# ---------------------------------------------------------------------- measures


def gradients(network: nn.Module, weights: Sequence[nn.Parameter], batches: Iterable[Any], loss: Loss) -> dict[str, Any]:
    """Mean loss, squared norm of the mean gradient, and mean squared gradient of a batch, by weight.

    Batches count alike.
    """
    losses, total, squares = [], [torch.zeros_like(weight) for weight in weights], [torch.zeros_like(w) for w in weights]
    for batch in batches:
        value = loss(network, batch)
        losses.append(float(value.detach()))
        for one, other, part in zip(total, squares, torch.autograd.grad(value, weights), strict=True):
            one += part
            other += part.square()
    count = len(losses)
    return {
        "loss": statistics.mean(losses),
        "gradient": sum(float((part / count).square().sum()) for part in total),
        "batch_gradient": sum(float(part.sum()) for part in squares) / count,
        "squares": [part / count for part in squares],
    }


def curvature(
    network: nn.Module, weights: Sequence[nn.Parameter], batches: Iterable[Any], loss: Loss, directions: Sequence[Direction]
) -> list[float]:
    """½ d·Hd for each direction, from products of the Hessian with it."""
    found, count = [0.0] * len(directions), 0
    for batch in batches:
        count += 1
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            slopes = torch.autograd.grad(loss(network, batch), weights, create_graph=True)
        for number, direction in enumerate(directions):
            slope = sum((part * d).sum() for part, d in zip(slopes, direction, strict=True))
            products = torch.autograd.grad(cast(Tensor, slope), weights, retain_graph=True)
            found[number] += 0.5 * sum(float((part * d).sum()) for part, d in zip(products, direction, strict=True))
    return [value / count for value in found]


@torch.no_grad()
def gaps(
    network: nn.Module, weights: Sequence[nn.Parameter], batches: Iterable[Any], loss: Loss, directions: Sequence[Direction]
) -> list[float]:
    """(L(W + d) + L(W - d)) / 2 - L(W) for each direction: the finite difference, with all orders in it."""
    before = [weight.clone() for weight in weights]
    batches, found = list(batches), []

    def mean_at(sign: float, direction: Direction) -> float:
        for weight, old, d in zip(weights, before, direction, strict=True):
            weight.copy_(old + sign * d)
        return statistics.mean(float(loss(network, batch)) for batch in batches)

    centre = mean_at(0, before)
    for direction in directions:
        found.append((mean_at(1, direction) + mean_at(-1, direction)) / 2 - centre)
    mean_at(0, before)
    return found


def differences(forms: Sequence[Any], generator: torch.Generator, draws: int, progress: float) -> list[list[Tensor]]:
    """W(v) minus the mean kernel, for draws of the method's own at that part of the training."""
    method = forms[0].method
    found = []
    for _ in range(draws):
        mixes = method.draw([form.site for form in forms], generator, progress)
        pairs = zip(forms, mixes, strict=True)
        found.append(
            [
                (method.compose(form.phi, mix, form.site) - method.collapse(form.phi, form.site)).detach()
                for form, mix in pairs
            ]
        )
    return found


def own_rates(optimizer: Any, weight: nn.Parameter) -> Tensor:
    """What each element's gradient is multiplied by: the rate, over the root of the second moment if there is one."""
    group = next(group for group in optimizer.param_groups if any(part is weight for part in group["params"]))
    state = optimizer.state.get(weight, {})
    if "exp_avg_sq" not in state:
        return torch.full_like(weight, group["lr"] / (1 - group.get("momentum", 0.0)))
    corrected: Tensor = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    rates: Tensor = group["lr"] / (corrected.sqrt() + group["eps"])
    return rates


# ---------------------------------------------------------------------- along a run


class Probe(Callback):
    """Measures at the ends of some epochs, at the collapsed weights, in evaluation mode; stands after Majority Kernels.

    BatchNorm has the statistics of the batches that are measured on: running ones lag behind the weights at high rates, and
    Majority Kernels has its own estimated anew, so that plain and other networks would differ by that alone.
    """

    def __init__(self, batches: Sequence[Any], probes: int = PROBES, draws: int = DRAWS, loss: Loss = cross_entropy) -> None:
        self.batches, self.probes, self.draws, self.loss = batches, probes, draws, loss
        self.rows: list[dict[str, float]] = []
        self._generator = torch.Generator().manual_seed(0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = trainer.max_epochs or 1
        at = {round(number * epochs / self.probes) for number in range(1, self.probes + 1)}
        if trainer.current_epoch + 1 in at:
            self.rows.append({"epoch": trainer.current_epoch + 1, **self.measure(trainer, pl_module)})

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        ours = next((c for c in trainer.callbacks if isinstance(c, SimulatedOverparam)), None)  # type: ignore[attr-defined]
        forms = [] if ours is None or ours.engine is None else list(ours.engine.forms.values())
        names = [form.site.name for form in forms]
        if not forms:
            plan = SimulatedOverparam(MajorityKernels()).plan(module)
            names = [row.site.name for row in plan.rows if row.method is not None]
        own = [module.get_parameter(name) for name in names]
        twin = plain_copy(module).eval()
        twin.requires_grad_(True)
        weights = [twin.get_parameter(name) for name in names]
        batches = [pl.utilities.move_data_to_device(batch, module.device) for batch in self.batches]
        with isolated_random_state():  # of dropout
            update_bn(batches, twin)
        optimizer = trainer.optimizers[0]
        found = gradients(twin, weights, batches, self.loss)
        squares = found.pop("squares")
        rate = float(optimizer.param_groups[0]["lr"])
        rates = [own_rates(optimizer, weight).detach() for weight in own]
        precondition = sum(float((h * g).sum()) for h, g in zip(rates, squares, strict=True))
        row = {**found, "rate": rate, "preconditioned": precondition}
        if forms:
            method = cast(MajorityKernels, forms[0].method)
            progress = cast(Any, ours).engine.progress
            directions = differences(forms, self._generator, self.draws, progress)
            bent = curvature(twin, weights, batches, self.loss, directions)
            group = optimizer.param_groups[0]
            decay = group.get("weight_decay", 0.0) * rate / (1 - group.get("momentum", 0.0))
            # λ h / h_j: a decay that is not divided by the second moment is a curvature of that size
            held = [
                decay / 2 * sum(float((d.square() / h.clamp_min(1e-12)).sum()) for d, h in zip(d_all, rates, strict=True))
                for d_all in directions
            ]
            amplification = predicted_amplification(method.draw_name, method.factor, method.alpha, method.strength(progress))
            row |= {
                "amplification": amplification,
                "curvature": statistics.mean(bent),
                "curvature_error": statistics.stdev(bent) / len(bent) ** 0.5,
                "gap": statistics.mean(gaps(twin, weights, batches, self.loss, directions)),
                "decay": statistics.mean(held),
                "predicted": rate / 4 * (amplification - 1) * found["batch_gradient"],
                "predicted_own_rates": (amplification - 1) / 4 * precondition,
            }
        return row
