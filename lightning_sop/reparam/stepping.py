"""The step cycle on an optimizer: φ takes the place of the weights for the length of ``step()`` only.

Everything that looks at the optimizer outside ``step()`` (clipping, unscaling, schedulers, fine-tuning callbacks, loggers,
checkpoints) sees the plain network's parameter groups, gradients and state.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_sop.reparam.checks import check_update
from lightning_sop.reparam.moments import PlainState, State, on_device, plain_dicts, plain_state

if TYPE_CHECKING:
    from lightning_sop.reparam.engine import Engine
    from lightning_sop.reparam.form import TrainingForm


class StepCycle:
    """What one engine does to one optimizer: swap in and pull back before the update, swap out and draw after it.

    Works through ``register_step_pre_hook`` and ``register_step_post_hook``, innermost: the user's own hooks see the plain
    network. A step that raises leaves the plain groups behind.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.moments: dict[str, list[State]] = {}  # by parameter name: the optimizer's state of each φ, between steps
        self.loaded: set[str] = set()  # moments from a checkpoint, whose plain image the optimizer loads for itself
        self._given: dict[str, PlainState] = {}
        self._swapped = False  # whether φ is in the place of the weights
        self._versions: list[int] = []  # of the weights since then
        self._checked = 0  # steps of which also the weights' values were looked at
        self._pulled: list[tuple[int, int]] = []  # gradients of the weights, as they were pulled back
        self._forms: list[TrainingForm] = []
        self._held: list[TrainingForm] = []
        self._depth = 0  # of calls of step() within each other
        self._hooks: tuple[RemovableHandle, RemovableHandle, RemovableHandle] | None = None
        self._step_before: Any = None  # the optimizer's own step() while ours is in its place

    @property
    def installed(self) -> bool:
        """Whether the optimizer's steps run through this cycle."""
        return self._hooks is not None

    def install(self) -> None:
        """Hang on the optimizer's steps (once)."""
        if self._hooks is None:
            self._forget_size()
            self._guard()
            self._hooks = (
                self.optimizer.register_step_pre_hook(self._before_step),
                self.optimizer.register_step_post_hook(self._after_step),
                self.optimizer.register_state_dict_post_hook(plain_dicts),
            )

    def remove(self) -> None:
        """Take the hooks away; the optimizer keeps a plain copy of its state."""
        self.abort()
        if self._hooks is None:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = None
        self._unguard()
        self._forget_size()
        state = self.optimizer.state
        for weight, entry in list(state.items()):
            if isinstance(entry, PlainState):
                state[weight] = dict(entry)
        self.loaded.update(self.moments)
        self._given.clear()

    def _forget_size(self) -> None:
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self.optimizer._numel_cache = None  # it counts its parameters' values once

    def innermost(self, held: list[TrainingForm]) -> None:
        """Before a step on these forms: run after the user's pre-hooks and before their post-hooks, always."""
        if not self._depth:
            self._held = held
        if self._hooks is not None:
            before, after, _ = self._hooks
            cast(OrderedDict[int, Any], self.optimizer._optimizer_step_pre_hooks).move_to_end(before.id)
            cast(OrderedDict[int, Any], self.optimizer._optimizer_step_post_hooks).move_to_end(after.id, last=False)

    def _guard(self) -> None:
        """Wrap the optimizer's ``step`` so that an exception inside it leaves the plain groups (hooks alone cannot)."""
        own = self.optimizer.__dict__.get("step")
        step = self.optimizer.step

        def guarded(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            except BaseException:
                self.abort()
                raise

        functools.update_wrapper(guarded, step)  # keeps the mark by which schedulers know a wrapped step
        # A bound method, because learning-rate schedulers wrap ``step.__func__``.
        method = self.optimizer.__dict__["step"] = types.MethodType(guarded, self.optimizer)
        self._step_before = own, method

    def _unguard(self) -> None:
        own, method = self._step_before
        if self.optimizer.__dict__.get("step") is method:  # else somebody has wrapped it in turn: harmless, it stays
            if own is None:
                del self.optimizer.__dict__["step"]
            else:
                self.optimizer.__dict__["step"] = own

    # ------------------------------------------------------------------ hooks

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._depth:  # a subclass that calls super().step(): φ is in place, with the gradients that it has edited
            self._depth += 1
            if self._swapped and self._pulled != _gradients(self._forms):
                self._pull_back()  # it has edited those of the weights instead
            return None
        self.abort()
        self._depth = 1
        self._forms, self._held = self._held, []
        if not self._forms:
            return None
        self.engine.build(self._forms)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._pull_back()
            self._swap_in()
            return None
        # torch's own optimizers begin with the closure; others (SAM) may look at a gradient that is there already.
        early = not type(optimizer).__module__.startswith("torch.optim")
        if early:
            self._pull_back()
        closure = self._around(closure, early)
        self._swap_in()
        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or not self._swapped:
            return
        self._swap_out()
        edited = [now not in (then, NO_GRADIENT) for then, now in zip(self._pulled, _gradients(self._forms), strict=True)]
        for form, version, unseen in zip(self._forms, self._versions, edited, strict=True):
            check_update(optimizer, form, version, unseen, by_value=self._checked < 3)
            form.trained = bool(form.trained)
            form.after_update()
        self._checked += 1
        if not _skipped(optimizer):
            self.engine.draw(self._forms)
        for form in self._forms:
            if form.mixed or form.training:
                form.write_mix()
            else:  # stepped between eval() and train(): whoever looks at the network now expects the collapsed one
                form.write_mean()

    def _around(self, closure: Callable[[], Any], pulled: bool) -> Callable[[], Any]:
        """The user's closure on the plain network, with φ's gradients afterwards; optimizers may call it repeatedly."""
        calls = 0

        @torch.enable_grad()
        def wrapped() -> Any:
            nonlocal calls
            swapped = self._swap_out()
            self._compose(moved=pulled or calls > 0)
            calls += 1
            result = closure()
            self._pull_back()
            if swapped:
                self._swap_in()
            return result

        return wrapped

    @torch.no_grad()
    def _compose(self, moved: bool) -> None:
        """Mixed weights for a closure; the optimizer may have moved φ since the last one."""
        for form in self._forms:
            if moved:
                form.after_update()
                form.write_mix()
            else:
                form.mix_in()

    @torch.no_grad()
    def _pull_back(self) -> None:
        for form in self._forms:
            form.follow()
            form.pull_back()
        self._pulled = _gradients(self._forms)

    # ------------------------------------------------------------------ the swap

    def _swap_in(self) -> None:
        """Groups and state: φ instead of the weights, in place (LBFGS keeps the list)."""
        by_id = {id(form.parameter): form for form in self._forms}
        for group in self.optimizer.param_groups:
            group["params"][:] = [phi for p in group["params"] for phi in (by_id[id(p)].phi if id(p) in by_id else [p])]
        self._swapped = True
        self._versions = [form.parameter._version for form in self._forms]
        state = self.optimizer.state
        for form in self._forms:
            for phi, moments in zip(form.phi, self._take_moments(form), strict=False):
                if moments:
                    state[phi] = moments

    def _swap_out(self) -> bool:
        """The plain network's groups and state again; returns whether φ was in place."""
        if not self._swapped:
            return False
        # Not from a list kept since: another engine on the same optimizer may be swapped out first, or not yet.
        weights: dict[int, list[Tensor]] = {}
        for form in self._forms:
            first, *others = map(id, form.phi)
            weights |= {key: [] for key in others}
            weights[first] = [form.parameter]
        for group in self.optimizer.param_groups:
            group["params"][:] = [p for phi in group["params"] for p in weights.get(id(phi), [phi])]
        self._swapped = False
        state = self.optimizer.state
        for form in self._forms:
            name = form.site.name
            self.moments[name] = [state.pop(phi, {}) for phi in form.phi]
            if any(self.moments[name]):
                self._given[name] = PlainState(functools.partial(plain_state, form, self.moments[name]))
                state[form.parameter] = self._given[name]
        return True

    @torch.no_grad()
    def abort(self) -> None:
        """Put the plain groups back after a step that raised."""
        self._depth = 0
        if self._swap_out():
            for form in self._forms:
                if form.mixed:
                    form.write_mix()  # φ may have moved

    def _take_moments(self, form: TrainingForm) -> list[State]:
        """The state of each φ for this step, out of what the optimizer holds for the weight now."""
        name = form.site.name
        entry = self.optimizer.state.pop(form.parameter, None)
        given = self._given.get(name)
        ours = entry is not None and (name in self.loaded or (entry is given and not given.edited))
        self.loaded.discard(name)
        if ours:
            return [on_device(state, form.phi[0].device) for state in self.moments.get(name, [])]
        if not entry:  # nothing yet, or the user has reset the optimizer's state
            return []
        # Loaded by a checkpoint of the plain network, or written by the user: each φ starts from the weight's state.
        per_parameter = not isinstance(self.optimizer, torch.optim.LBFGS)  # which keeps everything with its first one
        if per_parameter and all(phi.shape == form.parameter.shape for phi in form.phi):
            return [copy.deepcopy(dict(entry)) for _ in form.phi]
        return []


NO_GRADIENT = (0, 0)


def _gradients(forms: list[TrainingForm]) -> list[tuple[int, int]]:
    """Tells whether gradients of weights are the same tensors as before, and whether they were written."""
    found = [form.parameter.grad for form in forms]
    return [NO_GRADIENT if grad is None else (id(grad), grad._version) for grad in found]


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer was told by a GradScaler to leave its parameters alone (others are not even called)."""
    found = getattr(optimizer, "found_inf", None)
    # On an accelerator the answer would cost a synchronization per step; a new mix for the same φ does no harm there.
    return isinstance(found, Tensor) and found.device.type == "cpu" and bool(found.item())
