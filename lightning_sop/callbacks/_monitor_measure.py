"""One measurement: tensors gathered on their devices while a step goes on, fetched once when it is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_sop.callbacks._carry_over import combined
from lightning_sop.callbacks._growing_shape import growing
from lightning_sop.callbacks._monitor_layers import Target, layer_name
from lightning_sop.dynamics.gradients import implicit_regularization, norm_of
from lightning_sop.dynamics.moments import state_norms
from lightning_sop.dynamics.quantities import Layer, Quantity
from lightning_sop.growth.optimizers import plain_name

Values = dict[tuple[str, str], Tensor]
"""By quantity and layer, ``""`` for the run."""


class Fetched:
    """Tensors of any shapes by key, moved to the host together."""

    def __init__(self) -> None:
        self._tensors: dict[Any, Tensor] = {}
        self.values: dict[Any, Tensor] = {}

    def add(self, key: Any, value: Tensor | float) -> None:
        """Keep a value; numbers need no transfer."""
        if isinstance(value, Tensor):
            self._tensors[key] = value.detach()
        else:
            self.values[key] = torch.tensor(value, dtype=torch.float64)

    def fetch(self) -> None:
        """All values as float64 on the CPU, with one transfer from each device."""
        by_device: dict[torch.device, dict[Any, Tensor]] = {}
        for key, tensor in self._tensors.items():
            by_device.setdefault(tensor.device, {})[key] = tensor
        for device, tensors in by_device.items():
            dtype = torch.float32 if device.type == "mps" else torch.float64
            flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors.values()]).cpu().double()
            pieces = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
            self.values |= {key: p.view(t.shape) for (key, t), p in zip(tensors.items(), pieces, strict=True)}
        self._tensors = {}


@dataclass
class Gradient:
    """A parameter that has a gradient.

    Attributes:
        name: of its layer.
        rate: of its group, a number or a tensor.
        factor: what the rate is multiplied by, as far as gradients of the plain weight go.
        amplification: A; 1 without kernels.
    """

    name: str
    rate: Any
    factor: float
    amplification: float


class Measurement:
    """What is measured of one optimizer step.

    Args:
        rows: what to measure this time.
        targets: where.
        step: on the axis of the logs.
    """

    def __init__(self, rows: Iterable[Quantity], targets: Sequence[Target], step: int) -> None:
        self.rows = {row.name: row for row in rows}
        self.targets = list(targets)
        self.step = step
        self._fetched = Fetched()
        self._layers: dict[str, Layer] = {}  # those whose update is to come
        self._gradients: list[Gradient] = []
        self._seen: set[int] = set()  # optimizers whose gradients are measured

    def add(self, name: str, layer: str, value: Tensor | float) -> None:
        """Something that was measured elsewhere."""
        if name in self.rows:
            self._fetched.add((name, layer), value)

    def start(self) -> None:
        """Before the step: the state that it finds. What is needed afterwards is copied."""
        wanted = [row for row in self.rows.values() if row.when == "start"]
        updates = any(row.when == "step" for row in self.rows.values())
        if wanted or updates:
            for target in self.targets:
                layer = target.layer(copy=updates)
                self._measure(layer, wanted)
                layer.kernels = None
                if updates:
                    self._layers[target.name] = layer

    def gradients(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """When the gradients are there: unscaled, before clipping. Once for each optimizer."""
        if id(optimizer) in self._seen or not any(row.section == "gradients" for row in self.rows.values()):
            return
        self._seen.add(id(optimizer))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)  # unscales them in its step
        scale = float(scaler.get_scale()) if scaler is not None and scaled else 1.0
        names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
        factors = combined(event._factors for event in growing(trainer))
        targets = {id(target.parameter): target for target in self.targets}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    name = names.get(id(parameter), "")
                    target = targets.get(id(parameter))
                    method = None if target is None else target.kernels
                    factor = 1.0 if method is None else method.gradient_scale / method.factor
                    a = None if target is None else target.amplification
                    gradient = Gradient(
                        layer_name(name), group.get("lr", math.nan), factor * factors.get(name, 1.0), 1.0 if a is None else a
                    )
                    number = len(self._gradients)
                    self._gradients.append(gradient)
                    self._fetched.add(("norm", number), norm_of(parameter.grad) / scale)
                    self._fetched.add(("rate", number), gradient.rate)

    def stepped(self, optimizer: Optimizer) -> None:
        """After a step of an optimizer: the updates of its layers, once for each."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        wanted = [row for row in self.rows.values() if row.when == "step"]
        for target in self.targets:
            if id(target.parameter) in held and target.name in self._layers:
                layer = self._layers.pop(target.name)
                after = target.deployed()
                own = target.form is not None  # a tensor that nobody else holds
                layer.update = after.sub_(layer.weight) if own else after - layer.weight
                self._measure(layer, wanted)

    def remembered(self, optimizers: Sequence[Optimizer]) -> None:
        """The state of optimizers, when the step is done."""
        if "optimizer/{entry}" in self.rows:
            for optimizer in optimizers:
                for target in self.targets:
                    state = optimizer.state.get(target.parameter)
                    for entry, norm in (state_norms(state) if state else {}).items():
                        self._fetched.add((f"optimizer/{entry}", target.name), norm)

    def _measure(self, layer: Layer, rows: Sequence[Quantity]) -> None:
        for row in rows:
            value = row.measure(layer) if row.measure is not None else None
            if value is not None:
                self._fetched.add((row.name, layer.name), value)

    def finish(self) -> Values:
        """Everything, fetched from the devices."""
        self._fetched.fetch()
        found = self._fetched.values
        values = {key: value for key, value in found.items() if key[0] not in ("norm", "rate")}
        if self._gradients:
            numbers = range(len(self._gradients))
            norms, rates = ([float(found[(what, n)]) for n in numbers] for what in ("norm", "rate"))
            measured = {target.name for target in self.targets}
            for name in dict.fromkeys(("", *(g.name for g in self._gradients if g.name in measured))):
                chosen = [n for n in numbers if not name or self._gradients[n].name == name]
                values |= self._of_gradients(name, chosen, norms, rates)
        return values

    def _of_gradients(self, name: str, chosen: Sequence[int], norms: Sequence[float], rates: Sequence[float]) -> Values:
        gradients = [self._gradients[n] for n in chosen]
        own = [norms[n] for n in chosen]
        steps = [rates[n] * gradient.factor for n, gradient in zip(chosen, gradients, strict=True)]
        values = {
            "gradients/norm": math.sqrt(sum(norm * norm for norm in own)),
            "gradients/igr": implicit_regularization(own, steps),
            "gradients/igr_amplified": implicit_regularization(own, steps, [g.amplification for g in gradients]),
        }
        return {(key, name): torch.tensor(v, dtype=torch.float64) for key, v in values.items() if key in self.rows}


def state_totals(optimizers: Sequence[Optimizer], suffix: str) -> dict[str, float]:
    """Norms of every entry of all optimizers' states, over all parameters, as they are now.

    Args:
        optimizers: of the run.
        suffix: of the names.
    """
    fetched = Fetched()
    for optimizer in optimizers:
        for number, state in enumerate(optimizer.state.values()):
            for entry, norm in state_norms(state).items():
                fetched.add((entry, id(optimizer), number), norm)
    fetched.fetch()
    totals: dict[str, float] = {}
    for (entry, *_), norm in fetched.values.items():
        totals[entry] = totals.get(entry, 0.0) + float(norm) ** 2
    return {f"optimizer/{entry}{suffix}": math.sqrt(total) for entry, total in totals.items()}
