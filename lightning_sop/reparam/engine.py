"""The engine: attaches training forms to a model, and runs the step cycle on every optimizer that holds their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sop.reparam import live
from lightning_sop.reparam.base import Method, Site
from lightning_sop.reparam.checks import FORMAT, check_name, check_optimizer, check_state
from lightning_sop.reparam.form import TrainingForm
from lightning_sop.reparam.names import child_name
from lightning_sop.reparam.select import Plan
from lightning_sop.reparam.stepping import StepCycle
from lightning_sop.reparam.tied import TiedForm


class Engine:
    """Trains the weights that a plan selects through their training forms.

    Life: :meth:`attach` (forms in place, nothing built), :meth:`start` (φ is built around the weights that an optimizer
    holds, first mix drawn), then the optimizers' steps do the rest; :meth:`mix_in` and :meth:`mean_in` say which weight the
    layers hold; :meth:`release` leaves the collapsed weights, :meth:`detach` the plain model.

    Args:
        model: the module whose weights the plan names.
        plan: what to convert, from :func:`lightning_sop.reparam.select.make_plan`.
        seed: of this engine's own random generator; no other random state is ever touched.
        before: the engine of an earlier training of the model, whose random numbers, and whose forms in layers that are
            still there, this one goes on with.
    """

    def __init__(self, model: nn.Module, plan: Plan, seed: int, before: Engine | None = None) -> None:
        self.plan = plan
        # On the CPU whatever the default device is: the same random numbers for every machine.
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.progress = 0.0
        self.near = False  # build around weights that were trained already
        self.forms: dict[str, TrainingForm] = {}
        self._children: list[tuple[nn.Module, str, TrainingForm | TiedForm]] = []
        self._cycles: list[StepCycle] = []
        self._loaded_moments: list[Mapping[str, Any]] = []
        self.optimizers: list[Optimizer] = []
        self.attached = False
        for row, method in plan.converted:
            seed = int(torch.randint(2**62, (), generator=self.generator, device="cpu"))
            path, name = row.owner
            owner = model.get_submodule(path)
            known = None if before is None else before.forms.get(row.name)
            if known is None or not _is_of(known, owner, name, method, row.site):
                known = TrainingForm(owner, name, method, row.site, seed)
            form = self.forms[row.name] = known
            self._children.append((owner, child_name(name), form))
            for path, alias in row.aliases:
                other = model.get_submodule(path)
                if (other, alias) != (owner, name):  # another name may lead to the same layer
                    self._children.append((other, child_name(alias), TiedForm(form, alias)))

        if before is not None:
            self.generator.set_state(before.generator.get_state())

    def fits(self, model: nn.Module, plan: Plan) -> bool:
        """Whether a plan selects the weights that this engine has forms for, in the very same layers."""
        if [(row.names, row.site) for row, _ in plan.converted] != [(row.names, row.site) for row, _ in self.plan.converted]:
            return False
        named = [(self.forms[row.name], method, *row.owner) for row, method in plan.converted]
        return all(_is_of(form, model.get_submodule(path), name, method, form.site) for form, method, path, name in named)

    # ------------------------------------------------------------------ on the model

    def attach(self) -> None:
        """Put the forms into their layers and listen to optimizers from now on."""
        for owner, name, child in self._children:
            check_name(owner, name, child)
        for owner, name, child in self._children:
            left_over = owner._modules.get(name)  # in a copy of a model that was being trained
            if isinstance(left_over, TrainingForm) and left_over is not child:
                left_over.mean_in()
            owner._modules[name] = child
        for form in self.forms.values():
            if form.built:
                form.to(form.parameter.device, form.parameter.dtype)  # where the model has gone in the meantime
            form.live = True
            form.engine = self  # the model keeps its engine alive
        self.attached = True
        live.add(self)

    def release(self) -> None:
        """Leave the collapsed weights; from now on weights are what anybody makes them."""
        live.discard(self)
        for cycle in self._cycles:
            cycle.abort()
        for form in self.forms.values():
            # Otherwise the layer has been changed, and this may be the clean-up after the error it caused.
            if form.parameter_or_none is not None:
                form.mean_in()
            form.live = form.held = False
            form.engine = None
        for cycle in self._cycles:
            cycle.remove()

    def detach(self) -> None:
        """Release, and take the forms out of the model; the engine keeps them for a later :meth:`attach`."""
        self.release()
        for owner, name, child in self._children:
            if owner._modules.get(name) is child:
                del owner._modules[name]
        for form in self.forms.values():
            form.cpu()
        self.attached = False

    # ------------------------------------------------------------------ training

    def start(self, optimizers: Iterable[Optimizer]) -> None:
        """Build φ for every weight that these optimizers hold; call it again when they hold more (unfreezing)."""
        self.optimizers = list(optimizers)
        known = [cycle for cycle in self._cycles if cycle.optimizer in self.optimizers or cycle.installed]
        self._cycles = known
        for index, optimizer in enumerate(self.optimizers):
            held = self.held_by(optimizer)
            self.build(held)
            if held:
                check_optimizer(optimizer)
                cycle = self.cycle_of(optimizer)
                if index < len(self._loaded_moments):
                    _set_moments(cycle, self._loaded_moments[index])
        self._loaded_moments = []

    def build(self, forms: Iterable[TrainingForm]) -> None:
        """Build the forms that are not yet, and draw their first mix; the weights stay collapsed until :meth:`mix_in`."""
        new = [form for form in forms if not form.built]
        for form in new:
            form.build(near=self.near)
            _broadcast(form.storage)
        self.draw([form for form in forms if form.mix is None])

    def draw(self, forms: Iterable[TrainingForm]) -> None:
        """A new mix for these forms, from the engine's own generator (the same on every rank)."""
        by_method: dict[int, list[TrainingForm]] = {}
        for form in forms:
            by_method.setdefault(id(form.method), []).append(form)
        for group in by_method.values():
            sites = [form.site for form in group]
            mixes = group[0].method.draw(sites, self.generator, self.progress)
            for form, mix in zip(group, mixes, strict=True):
                form.mix, form.drawn_at = mix, self.progress

    def mix_in(self) -> None:
        """Mixed weights in every layer that is trained: before a training forward."""
        for form in self.forms.values():
            form.mix_in()

    def mean_in(self) -> None:
        """Collapsed weights in every layer: for evaluation, averaging, saving."""
        for form in self.forms.values():
            form.mean_in()

    @contextmanager
    def collapsed(self) -> Iterator[None]:
        """Collapsed weights in every layer for a while, whatever the model's mode; then what there was before."""
        before = [(form, form.held, form.mixed) for form in self.forms.values()]
        self.hold(True)
        try:
            yield
        finally:
            for form, held, mixed in before:
                form.held = held
                if mixed:
                    form.mix_in()

    def hold(self, held: bool) -> None:
        """Collapsed weights until further notice, also where the model is put into training mode; or no longer."""
        for form in self.forms.values():
            form.held = held
        if held:
            self.mean_in()

    def held_by(self, optimizer: Optimizer) -> list[TrainingForm]:
        """The forms whose weights are in the optimizer's groups, in the plan's order; frozen ones only if they are built."""
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        held, lost = [], []
        for form in self.forms.values():
            weight = form.parameter_or_none
            if weight is None or weight.shape != form.site.shape:
                lost.append(form)
            elif id(weight) in ids and (form.built or weight.requires_grad):
                held.append(form)
        if held and lost:  # not where the optimizer is another model's: the steps of all of them come by here
            _ = lost[0].parameter  # raises, by name
        return held

    def check_layers(self, model: nn.Module) -> None:
        """Raise, by name, where a layer whose weight is trained here is no longer in the model."""
        inside = {id(part) for part in model.modules()} if self.attached and self._cycles else set()
        for form in self.forms.values() if inside else ():
            if id(form._owner) not in inside:
                raise form.lost("is no longer in the model, which has another layer there")

    def cycle_of(self, optimizer: Optimizer) -> StepCycle:
        """The step cycle on this optimizer, made at first sight."""
        cycle = self._known(optimizer)
        if cycle is None:
            cycle = StepCycle(self, optimizer)
            self._cycles.append(cycle)
        if self.attached:
            cycle.install()
        return cycle

    def _known(self, optimizer: Optimizer) -> StepCycle | None:
        return next((cycle for cycle in self._cycles if cycle.optimizer is optimizer), None)

    def _catch_up(self, form: TrainingForm) -> None:
        """φ follows the weight, also after training, while the model still has that weight."""
        if self.attached or form.parameter_or_none is not None:
            with torch.no_grad():
                form.follow()

    def __getstate__(self) -> dict[str, Any]:
        # Spawned processes get the model and φ; optimizers and their hooks are made there.
        return {**self.__dict__, "_cycles": [], "optimizers": []}

    # ------------------------------------------------------------------ state

    def collapsed_weights(self) -> dict[str, Tensor]:
        """Every trained weight recomputed from φ in float64, under each name that the plain model has for it."""
        weights = {}
        for row, _ in self.plan.converted:
            form = self.forms[row.name]
            if form.built:
                self._catch_up(form)
                device = "cpu" if form.phi[0].device.type == "mps" else form.phi[0].device  # which has no float64
                exact = [phi.detach().to(device, torch.float64) for phi in form.phi]
                for name in row.names:
                    weights[name] = form.method.collapse(exact, form.site).detach()
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Versioned plain data: φ and mix of every built form, φ's moments by optimizer, the generator."""
        forms = {}
        for name, form in self.forms.items():
            if form.built:
                self._catch_up(form)
                forms[name] = {
                    "names": list(self.plan.row(name).names),
                    "method": type(form.method).__name__,
                    "settings": form.method.settings,
                    "shape": list(form.site.shape),
                    "out_axis": form.site.out_axis,
                    "storage": [tensor.detach() for tensor in form.storage],
                    "mix": form.mix,
                    "drawn_at": form.drawn_at,
                    "trained": form.trained,
                }
        known = [self._known(optimizer) for optimizer in self.optimizers]
        moments = [{} if cycle is None else dict(cycle.moments) for cycle in known]
        return {"format": FORMAT, "generator": self.generator.get_state(), "forms": forms, "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the weights of the same checkpoint must be loaded already.

        Raises:
            ValueError: the state is of another method, factor, model or format; the message names the parameter.
        """
        check_state(state, self.forms)
        self.generator.set_state(state["generator"].cpu())
        for name, form in self.forms.items():
            saved = state["forms"].get(name)
            if saved is None:
                form.mean_in()
                form.discard()
            else:
                form.load(saved["storage"], saved["mix"])
                # not in older checkpoints
                form.drawn_at, form.trained = saved.get("drawn_at", 0.0), saved.get("trained")
        self._loaded_moments = list(state["moments"])
        for optimizer, moments in zip(self.optimizers, self._loaded_moments, strict=False):
            if self.held_by(optimizer):
                _set_moments(self.cycle_of(optimizer), moments)


def _is_of(form: TrainingForm, owner: nn.Module, name: str, method: Method, site: Site) -> bool:
    """Whether a form is that of a layer's parameter, by a method."""
    return form._owner is owner and (form._name, form.site) == (name, site) and form.method is method


def _set_moments(cycle: StepCycle, moments: Mapping[str, Any]) -> None:
    cycle.moments = {name: [dict(state) for state in states] for name, states in moments.items()}
    cycle.loaded = set(cycle.moments)


def _broadcast(tensors: Iterable[Tensor]) -> None:
    """Rank 0's φ everywhere: a rank whose weights differ at build would otherwise diverge in silence."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)
