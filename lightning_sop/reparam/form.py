"""The training form of one weight: φ beside the layer's own parameter, unseen by ``parameters()`` and ``state_dict()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sop.reparam.base import Method, Site
from lightning_sop.reparam.bits import same_bits
from lightning_sop.reparam.names import owner_key


class TrainingForm(nn.Module):
    """A child of a layer that holds the tensors φ through which one of the layer's weights is trained.

    The layer keeps its weight; this form writes it: the *mixed* weight for a training forward, the *collapsed* one for
    everything else. It is a module so that ``print(model)`` shows it and so that it hears of ``train()``, ``eval()``, device
    moves, copies and saving like any other part of the model. φ stays out of the registries of parameters and buffers.

    Before :meth:`build` the form holds nothing and the weight is an ordinary one.
    """

    # Nothing of this module is to be registered, so the bookkeeping of nn.Module's own is left out: it runs at every step.
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    # TorchScript makes an empty part of a form: what is a property, or of a type that it does not know, it leaves out.
    __jit_unused_properties__ = ("built", "parameter", "parameter_or_none", "training")

    def __init__(self, owner: nn.Module, name: str, method: Method, site: Site, seed: int) -> None:
        self.live = False  # an engine trains through this form (never true of a copy)
        self.held = False  # the layer is to have the collapsed weight, whatever train() says
        super().__init__()
        self._owner, self._name = owner, name
        self.method, self.site, self.seed = method, site, seed
        self.engine: object = None  # whoever trains through this form
        self.mixed: bool  # what the weight holds now: the mix, or the collapsed weight
        self.mix: Tensor | None  # the mix of the current step
        self.drawn_at = 0.0  # the part of the training that was done when it was drawn
        self.trained: bool | None  # whether a step ever had a gradient for it; None before the first
        self.storage: list[Tensor]  # the memory of φ
        self.phi: list[nn.Parameter]  # φ as the optimizer sees it: views of storage
        self._gradients: list[Tensor]
        self._gradient_storage: list[Tensor]
        self._addresses: list[int] = []  # of φ's memory, to notice optimizers that replace ``φ.data``
        self._written: Tensor | None  # what was last written into the weight, to notice writes by others
        self._written_version = 0
        self._version_guard: tuple[Any, int] | None
        self._mixed_grad: tuple[Tensor, int] | None  # the gradient, as it was when a mix gave way to the mean
        self.discard()
        self.training = owner.training

    @property
    def built(self) -> bool:
        """Whether φ exists; until then the weight is an ordinary one."""
        return bool(self.phi)

    @property
    def parameter(self) -> nn.Parameter:
        """The layer's own parameter, looked up each time (a module may be given a new one)."""
        weight = self.parameter_or_none
        if weight is None or weight.shape != self.site.shape:
            shape = None if weight is None else tuple(weight.shape)
            raise self.lost("is no longer a parameter of its layer" if shape is None else f"has become of shape {shape}")
        return weight

    def lost(self, what: str) -> RuntimeError:
        """The error for a weight that this form cannot train any more."""
        return RuntimeError(
            f"{self.site.name} {what}: it was pruned, parametrized, deleted or replaced after SimulatedOverparam was "
            f"attached. Do that before training starts, or exclude '{self.site.name}'."
        )

    @property
    def parameter_or_none(self) -> nn.Parameter | None:
        """The parameter, or None where the layer no longer has it."""
        return self._owner._parameters.get(self._name)

    def extra_repr(self) -> str:
        shape = tuple(self.site.shape)
        return f"{self._name} {shape} <- " + (" + ".join(str(tuple(t.shape)) for t in self.storage) or "not built yet")

    def _get_name(self) -> str:
        return type(self.method).__name__

    @torch.no_grad()
    def build(self, *, near: bool = False) -> None:
        """Make φ around the weight as it is now; ``near`` keeps φ close to it (a weight that was trained already)."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        self.set_storage(self.method.build(self.parameter.detach(), self.site, generator, near=near))
        self._mark_collapsed()

    def set_storage(self, storage: list[Tensor]) -> None:
        """Take these tensors as φ's memory; the weight is not written."""
        self.storage = storage
        self.phi = [nn.Parameter(view) for view in self.method.parameters(storage)]
        self._addresses = [phi.data_ptr() for phi in self.phi]
        self._gradients, self._gradient_storage = [], []

    @torch.no_grad()
    def load(self, storage: list[Tensor], mix: Tensor | None) -> None:
        """Take φ from a checkpoint whose weights are in place; weights that differ from φ's own win."""
        self.mean_in()
        weight = self.parameter
        self.set_storage([tensor.detach().to(weight.device, weight.dtype, copy=True) for tensor in storage])
        self.mix = mix
        collapsed = self.collapsed()
        # Equal up to rounding (another device, or a lower precision than now: Lightning casts later): φ is kept as it is.
        tolerance = 8 * max(torch.finfo(tensor.dtype).eps for tensor in (weight, *storage))
        largest = float(collapsed.abs().max()) if collapsed.numel() else 0.0
        if torch.allclose(weight, collapsed, rtol=tolerance, atol=tolerance * largest):
            weight.copy_(collapsed)
            self._mark_collapsed()
        else:
            self.accept_loaded()

    def discard(self) -> None:
        """Forget φ: the weight is an ordinary one again."""
        self.storage, self.phi = [], []
        self._gradients, self._gradient_storage = [], []
        self.mix = self.trained = self._written = self._version_guard = self._mixed_grad = None
        self.mixed = False

    def collapsed(self) -> Tensor:
        """The deployable weight, a new tensor of the weight's dtype; the weight itself is not touched."""
        # What is saved during Lightning's evaluation is an ordinary tensor, too; leaving inference mode enables gradients.
        with torch.inference_mode(False), torch.no_grad():
            weight = torch.empty_like(self.parameter)
            self.method.write(weight, self.phi, None, self.site)
        return weight

    @torch.no_grad()
    def mix_in(self) -> None:
        """Write the mixed weight, before a training forward, unless nobody trains it (a teacher that an optimizer holds)."""
        if not self.built or self.mix is None or self.mixed or self.trained is False or not self.parameter.requires_grad:
            return
        guard, self._version_guard = self._version_guard, None
        changed = self.follow()
        untouched = guard is not None and not changed and guard[1] == self.parameter._version
        self.write_mix()
        if guard is not None and untouched:
            # The weight holds again, bit for bit, what a pending backward has saved; its version may say so too. That is
            # what lets a training step evaluate or generate between forward and backward.
            guard[0].__exit__()
            self._written_version = self.parameter._version

    def write_mix(self) -> None:
        """Write the mixed weight (under no_grad) after φ or the mix have changed; nobody else has written it since."""
        weight = self.parameter
        if not weight.requires_grad or self.trained is False:  # frozen since: a constant, and that is the collapsed weight
            self.mean_in()
            return
        self.method.write(weight, self.phi, self.mix, self.site)
        self._remember(weight)
        self.mixed, self._version_guard, self._mixed_grad = True, None, None

    @torch.no_grad()
    def mean_in(self) -> None:
        """Write the collapsed weight, for whoever evaluates, averages or saves it."""
        if not self.built or not self.mixed:
            return
        changed = self.follow()
        weight = self.parameter
        guard = torch.autograd.grad_mode._unsafe_preserve_version_counter(weight)
        self.write_mean()
        self._version_guard = None if changed else (guard, weight._version)
        self._mixed_grad = None if weight.grad is None else (weight.grad, weight.grad._version)

    def write_mean(self) -> None:
        """Write the collapsed weight (under no_grad); nobody else has written the weight since this form last did."""
        self.method.write(self.parameter, self.phi, None, self.site)
        self._mark_collapsed()

    def follow(self) -> bool:
        """Give φ what others wrote into the weight since this form last did; returns whether they have. Under no_grad."""
        if not self.built or self._written is None:
            return False
        weight = self.parameter
        if self._written.device != weight.device or self._written.dtype != weight.dtype:  # moved while detached
            self.to(weight.device, weight.dtype)
        on_cpu = weight.device.type == "cpu"
        # By value and not by version counter: writes through ``.data`` do not count as versions.
        if on_cpu and same_bits(weight, self._written):
            return False
        # Asking for the value would make the host wait for an accelerator at every step: shift there, by zero perhaps.
        changed = on_cpu or weight._version != self._written_version
        self.method.shift(self.phi, self._written, weight, self.site)
        self._remember(weight)
        return changed

    def _remember(self, weight: Tensor) -> None:
        written = self._written
        if written is None or written.shape != weight.shape or written.device != weight.device:
            self._written = weight.detach().clone()
        else:
            written.copy_(weight)
        self._written_version = weight._version

    def _mark_collapsed(self) -> None:
        self._remember(self.parameter)
        self.mixed, self._version_guard, self._mixed_grad = False, None, None

    @torch.no_grad()
    def accept_loaded(self) -> None:
        """The weight was loaded as a whole: from now on φ collapses to it."""
        if self.built and not torch.equal(self.parameter, self._written if self._written is not None else self.collapsed()):
            self.method.shift(self.phi, self.collapsed(), self.parameter, self.site)
            self._mark_collapsed()

    def gradients(self) -> list[Tensor]:
        """Buffers for the gradients of φ, kept between steps (fresh memory every step is slow)."""
        if not self._gradients:
            self._gradient_storage = [torch.zeros_like(tensor) for tensor in self.storage]
            self._gradients = self.method.parameters(self._gradient_storage)
        return self._gradients

    def pull_back(self) -> None:
        """Set the gradient of every φ from the weight's gradient (None, where the weight has none). Under no_grad."""
        grad = self.parameter.grad
        if grad is None:
            for parameter in self.phi:
                parameter.grad = None
            return
        self.trained = True
        mix = self.mix if self.mixed or self._grad_is_of_the_mix(grad) else None
        views = self.gradients()
        pulled = self.method.pull_back(self.phi, mix, grad, self.site, self._gradient_storage)
        for parameter, value in zip(self.phi, views if pulled is None else pulled, strict=True):
            parameter.grad = value

    def _grad_is_of_the_mix(self, grad: Tensor) -> bool:
        """Whether the gradient was there, as it is now, when ``eval()`` took the mix away (before ``step()``)."""
        return self._mixed_grad is not None and self._mixed_grad[0] is grad and self._mixed_grad[1] == grad._version

    def after_update(self) -> None:
        """Follow an optimizer that has also cleared φ's gradients (SAM) or replaced ``φ.data``. Under no_grad."""
        if all(phi.grad is None for phi in self.phi):
            self.parameter.grad = None
        if [phi.data_ptr() for phi in self.phi] != self._addresses:
            for phi, view in zip(self.phi, self.method.parameters(self.storage), strict=True):
                view.copy_(phi)
                phi.data = view

    @property
    def training(self) -> bool:
        return bool(self.__dict__.get("_training", True))

    @training.setter
    def training(self, mode: bool) -> None:
        # Lightning restores train mode by setting this attribute, users call train() and eval(): both arrive here.
        self.__dict__["_training"] = mode
        if not mode:
            self.mean_in()
        elif self.live and not self.held:
            self.mix_in()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Adds nothing of its own; the layer's entry becomes the collapsed weight where the layer holds a mix."""
        return self.save_as(owner_key(prefix, self._name), {} if destination is None else destination, keep_vars)

    def save_as(self, key: str, destination: Any, keep_vars: bool) -> Any:
        """Put a copy of the collapsed weight where a layer holds a mix, or will again before the state is written."""
        if self.built and (self.mixed or self.held) and not keep_vars and key in destination:
            with torch.no_grad():
                self.follow()  # a write that nobody has noticed yet is part of what is saved
            destination[key] = self.collapsed()
        return destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Called right after the layer's own tensors were loaded, and those are weights to deploy, not mixes. The mix comes
        # back with the next training step.
        self.accept_loaded()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingForm:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.built:
            # Only where to and which dtype: a memory format that suits the weight may not suit a stack of kernels.
            like = fn(torch.empty(0, dtype=self.storage[0].dtype, device=self.storage[0].device))
            self.set_storage([tensor.to(like.device, like.dtype) for tensor in self.storage])
            if self._written is not None:
                self._written = self._written.to(like.device, like.dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        weight = self._owner._parameters.get(self._name)
        dropped: dict[str, Any] = {name: [] for name in ("phi", "_gradients", "_gradient_storage")}
        dropped |= {"live": False, "held": False, "engine": None, "_version_guard": None, "_mixed_grad": None}
        return {**self.__dict__, **dropped, "weight": weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        weight = state.pop("weight")  # the copy's own; its layer is not complete at this moment
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.storage:
            self.set_storage(self.storage)  # phi: views, not copied
        if self.mixed and weight is not None:  # a copy is the network to deploy, whatever the original was doing
            with torch.no_grad():
                self.method.write(weight, self.phi, None, self.site)
            self.mixed, self._written = False, weight.detach().clone()
