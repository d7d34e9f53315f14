"""Which weights of a run are measured, and what they are at one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_sop.callbacks.simulated_overparam import SimulatedOverparam
from lightning_sop.dynamics.kernels import predicted_amplification
from lightning_sop.dynamics.quantities import Layer
from lightning_sop.growth.optimizers import plain_name
from lightning_sop.reparam.engine import Engine
from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.majority import MajorityKernels
from lightning_sop.reparam.names import matches, split
from lightning_sop.reparam.select import _OUTPUT_ON_AXIS_1, DEFAULT_LAYERS, _is_a


@dataclass(frozen=True)
class Target:
    """A weight that is measured.

    Attributes:
        name: its layer's path without wrappers of ``torch.compile``, or its own where it is not called ``weight``.
        parameter: as it is at present.
        out_axis: of output units.
        form: its training form, if it is trained in one that has been built.
    """

    name: str
    parameter: nn.Parameter
    out_axis: int
    form: TrainingForm | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Output units, and values of each."""
        units = self.parameter.shape[self.out_axis]
        return units, self.parameter.numel() // max(1, units)

    @property
    def kernels(self) -> MajorityKernels | None:
        """The method, where the weight has kernels."""
        method = None if self.form is None else self.form.method
        return method if isinstance(method, MajorityKernels) else None

    def deployed(self, *, copy: bool = False) -> Tensor:
        """The weight that would be deployed now; a tensor of its own if it is computed, or if ``copy`` asks for that."""
        if self.form is not None:
            return self.form.collapsed()
        weight = self.parameter.detach()
        return weight.clone() if copy else weight

    @property
    def amplification(self) -> float | None:
        """A that is predicted for its present mix; None where it has no kernels."""
        method = self.kernels
        if method is None or self.form is None:
            return None
        strength = method.strength(self.form.drawn_at)
        return predicted_amplification(method.draw_name, method.factor, method.alpha, strength)

    def layer(self, *, copy: bool) -> Layer:
        """What the quantities are measured of, before a step; with a weight of its own if ``copy`` asks for that."""
        kernels = self.form.storage[0] if self.form is not None and self.kernels is not None else None
        return Layer(self.name, self.deployed(copy=copy), self.out_axis, kernels, self.amplification, form=self.form)


def layer_name(parameter: str) -> str:
    """Under which name a weight is logged."""
    return plain_name(parameter).removesuffix(".weight")


def engines_of(trainer: Trainer) -> list[Engine]:
    """Those that train weights in larger forms in this run."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, SimulatedOverparam)]  # type: ignore[attr-defined]
    return [callback.engine for callback in callbacks if callback.engine is not None and callback.engine.attached]


def targets_of(trainer: Trainer, module: LightningModule, patterns: Sequence[str] | None) -> list[Target]:
    """The weights to measure, as they are at present.

    Args:
        trainer: of the run.
        module: in training.
        patterns: of names, of layers or of modules around them. None: all weights that are selected for a training form; in
            a run without any, those of all linear, convolutional and recurrent layers.

    Raises:
        ValueError: a pattern matches nothing; the message names it.
    """
    forms = {id(form.parameter_or_none): form for engine in engines_of(trainer) for form in engine.forms.values()}
    found = []
    for name, parameter, axis in _weights(module, set(forms)):
        form = forms.get(id(parameter))
        if patterns is None and forms and form is None:
            continue
        if form is not None and not form.built:
            form = None
        found.append((name, Target(layer_name(name), parameter, axis, form)))
    for pattern in patterns or ():
        if not any(matches(pattern, name) for name, _ in found):
            shown = ", ".join(name for name, _ in found[:8]) + (", …" if len(found) > 8 else "")
            raise ValueError(f"DynamicsMonitor: the pattern {pattern!r} matches no weight that can be measured: {shown}")
    return [target for name, target in found if patterns is None or any(matches(p, name) for p in patterns)]


def _weights(module: LightningModule, converted: set[int]) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Names, tensors and axes of output units of all weights that count, each once."""
    seen = set()
    for full, parameter in module.named_parameters():
        path, local = split(full)
        layer = module.get_submodule(path)
        usual = _is_a(layer, DEFAULT_LAYERS) and (local.startswith("weight") or local.endswith("_weight"))
        unfit = isinstance(parameter, UninitializedParameter) or parameter.dim() < 2 or not parameter.is_floating_point()
        if (usual or id(parameter) in converted) and not unfit and id(parameter) not in seen:
            seen.add(id(parameter))
            yield plain_name(full), parameter, 1 if _is_a(layer, _OUTPUT_ON_AXIS_1) else 0
