"""The rows of the table for training as such: kernels, weights, updates, loss, gradients, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_sop.dynamics.kernels import KernelProducts
from lightning_sop.dynamics.quantity import Layer, Quantity
from lightning_sop.dynamics.spectra import effective_rank, stable_rank

_KERNELS = "this package; kernels and mixes: arXiv 2402.05033"
_ROY = "Roy and Vetterli, EUSIPCO 2007: effective rank"
_RUDELSON = "Rudelson and Vershynin, J. ACM 2007: numerical rank"
_BARRETT = "Barrett and Dherin, arXiv 2009.11162: the modified loss"
_AMPLIFIED = "this package: docs/methods/majority_kernels.md, small deviations"
_VALUES = "(min(units, rest),)"


def _kernels(read: Callable[[KernelProducts], Tensor]) -> dict[str, Any]:
    """How a quantity of the kernels' inner products is measured."""
    return {
        "per": "layer",
        "when": "start",
        "measure": lambda layer: None if layer.products is None else read(layer.products),
    }


def _norms(when: str, read: Callable[[Layer], Tensor | None]) -> dict[str, Any]:
    """How a quantity of norms is measured."""
    return {"per": "layer", "when": when, "measure": read}


def _ratio(layer: Layer) -> Tensor | None:
    return None if layer.update_norm is None else layer.update_norm / layer.weight_norm


def _spectrum(of: str, read: Callable[[Tensor], Tensor], per: str = "layer") -> dict[str, Any]:
    """How a quantity of singular values is measured."""

    def measure(layer: Layer) -> Tensor | None:
        values = layer.weight_values if of == "weight" else layer.update_values
        return None if values is None else read(values)

    return {"per": per, "slow": True, "when": "start" if of == "weight" else "step", "measure": measure}


def _share(values: Tensor) -> Tensor:
    return effective_rank(values) / len(values)


KERNELS = (
    Quantity(
        "kernels/spread",
        "1",
        "scalar",
        "Root of the mean square distance of the kernels from their mean (over k - 1), over the norm of the mean.",
        _KERNELS,
        total="mean",
        **_kernels(KernelProducts.spread),
    ),
    Quantity(
        "kernels/cosine",
        "1",
        "scalar",
        "Mean cosine of the angle between two different kernels.",
        _KERNELS,
        total="mean",
        **_kernels(KernelProducts.cosine),
    ),
    Quantity(
        "kernels/cosines",
        "1",
        "matrix",
        "Cosine of the angle between every two kernels.",
        _KERNELS,
        shape="(k, k)",
        total="mean",
        slow=True,
        **_kernels(KernelProducts.cosines),
    ),
    Quantity(
        "kernels/entropy",
        "1",
        "scalar",
        "Entropy of the mix over log k, mean over the draws since the last measurement; 1 is the mean of the kernels.",
        _KERNELS,
        per="layer",
        total="mean",
    ),
    Quantity(
        "kernels/amplification",
        "1",
        "scalar",
        "k‖v‖² of the mix v, mean over the draws since the last measurement: the amplification A as it was drawn.",
        _AMPLIFIED,
        per="layer",
        total="mean",
    ),
    Quantity(
        "kernels/amplification_predicted",
        "1",
        "scalar",
        "A = k E‖v‖² of the distribution that mixes are drawn from, as annealed when the mix was drawn.",
        _AMPLIFIED,
        per="layer",
        total="mean",
        when="start",
        measure=lambda layer: layer.amplification,
    ),
)

WEIGHTS = (
    Quantity(
        "weights/norm",
        "weight",
        "scalar",
        "Euclidean norm of the collapsed weight; of the plain one where it has no training form.",
        total="mean",
        **_norms("start", lambda layer: layer.weight_norm),
    ),
    Quantity(
        "weights/effective_rank",
        "1",
        "scalar",
        "Exponential of the entropy of the collapsed weight's singular values over their sum.",
        _ROY,
        total="mean",
        **_spectrum("weight", effective_rank),
    ),
    Quantity(
        "weights/stable_rank",
        "1",
        "scalar",
        "Squared Frobenius norm of the collapsed weight over its squared spectral norm.",
        _RUDELSON,
        total="mean",
        default=False,
        **_spectrum("weight", stable_rank),
    ),
    Quantity(
        "weights/spectrum",
        "weight",
        "vector",
        "Singular values of the collapsed weight as a matrix of output units by the rest, the largest first.",
        shape=_VALUES,
        total="none",
        **_spectrum("weight", lambda values: values),
    ),
    Quantity(
        "weights/ranks",
        "1",
        "matrix",
        "Effective rank of each layer's weight over its largest possible value, by layer and time.",
        _ROY,
        shape="(layers, measurements)",
        **_spectrum("weight", _share, per="run"),
    ),
)

UPDATES = (
    Quantity(
        "updates/norm",
        "weight",
        "scalar",
        "Euclidean norm of what one optimizer step has added to the collapsed weight.",
        total="mean",
        **_norms("step", lambda layer: layer.update_norm),
    ),
    Quantity(
        "updates/ratio",
        "1",
        "scalar",
        "Norm of what one optimizer step has added to the collapsed weight, over the norm of that weight.",
        total="mean",
        **_norms("step", _ratio),
    ),
    Quantity(
        "updates/effective_rank",
        "1",
        "scalar",
        "Exponential of the entropy of the update's singular values over their sum.",
        _ROY,
        total="mean",
        **_spectrum("update", effective_rank),
    ),
    Quantity(
        "updates/stable_rank",
        "1",
        "scalar",
        "Squared Frobenius norm of the update over its squared spectral norm.",
        _RUDELSON,
        total="mean",
        default=False,
        **_spectrum("update", stable_rank),
    ),
    Quantity(
        "updates/spectrum",
        "weight",
        "vector",
        "Singular values of the update, the largest first.",
        shape=_VALUES,
        total="none",
        **_spectrum("update", lambda values: values),
    ),
    Quantity(
        "updates/ranks",
        "1",
        "matrix",
        "Effective rank of each layer's update over its largest possible value, by layer and time.",
        _ROY,
        shape="(layers, measurements)",
        **_spectrum("update", _share, per="run"),
    ),
)

_BATCH = "without dropout and with norms over the batch, on a copy"
LOSS = (
    Quantity("loss/mixed", "loss", "scalar", f"Loss of the step's first batch under its mix, {_BATCH}.", slow=True),
    Quantity(
        "loss/collapsed",
        "loss",
        "scalar",
        f"Loss of the step's first batch under the collapsed weights, {_BATCH}.",
        slow=True,
    ),
    Quantity(
        "loss/gap",
        "loss",
        "scalar",
        "Loss of the step's first batch under its mix, less that under the collapsed weights.",
        slow=True,
    ),
)

GRADIENTS = (
    Quantity(
        "gradients/norm",
        "loss/weight",
        "scalar",
        "Euclidean norm of the gradient at the mixed weight, unscaled, before clipping; of the run: of all parameters.",
        per="layer",
        summary="max",
    ),
    Quantity(
        "gradients/igr",
        "loss",
        "scalar",
        "Implicit gradient regularization ¼ Σ h‖g‖², with each tensor's learning rate h; of the run: over all parameters.",
        _BARRETT,
        per="layer",
    ),
    Quantity(
        "gradients/igr_amplified",
        "loss",
        "scalar",
        "Implicit gradient regularization ¼ Σ A h‖g‖², with each tensor's learning rate h and, where it has kernels, their "
        "predicted amplification A; of the run: over all parameters.",
        _AMPLIFIED,
        per="layer",
    ),
)

OPTIMIZER = (
    Quantity(
        "optimizer/{entry}",
        "entry",
        "scalar",
        "Euclidean norm of an entry of the optimizer's state (exp_avg, momentum_buffer, …) for the plain weight.",
        per="layer",
        total="norm",
        slow=True,
    ),
    Quantity(
        "optimizer/{entry}_before_growth",
        "entry",
        "scalar",
        "Euclidean norm of an entry of the optimizer's state over all parameters, just before the network grows.",
    ),
    Quantity(
        "optimizer/{entry}_after_growth",
        "entry",
        "scalar",
        "Euclidean norm of an entry of the optimizer's state over all parameters, just after the network has grown.",
    ),
)

TRAINING = (*KERNELS, *WEIGHTS, *UPDATES, *LOSS, *GRADIENTS, *OPTIMIZER)
