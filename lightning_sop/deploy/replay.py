"""Calls recorded from real forwards, and what two sets of weights answer to them."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sop.deploy.alone import alone

SAMPLES = 4  # what is kept of a batch
MAX_BYTES = 8 * 2**20  # largest inputs that are kept whole where they cannot be cut


@dataclass(frozen=True)
class Call:
    """One recorded call: the module's path (``""`` for the root), and its arguments."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def shapes(self) -> list[list[int]]:
        """Shapes of the tensors among the arguments."""
        return [list(tensor.shape) for tensor in tensors_in((self.args, self.kwargs))]


class Difference(NamedTuple):
    """Largest difference between two lists of tensors, as it is and relative to the largest value of its tensor."""

    absolute: float
    relative: float
    name: str

    def exceeds(self, tolerance: float) -> bool:
        """Whether the relative difference is above the tolerance or not a number."""
        return not self.relative <= tolerance


NO_DIFFERENCE = Difference(0.0, 0.0, "")


def record(module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Copy a call's arguments, whole if they are not too large, else a few samples of them.

    Returns:
        The call, or None where the arguments cannot be copied or are too large to keep.
    """
    call = Call(module, args, kwargs)
    try:
        for candidate in (call, few_samples(call)):
            tensors = list(tensors_in((candidate.args, candidate.kwargs))) if candidate else []
            if candidate and tensors and sum(tensor.nbytes for tensor in tensors) <= MAX_BYTES:
                return _mapped(lambda tensor: tensor.detach().clone(), candidate)
    except Exception:  # an argument of the user's own class may fail in any way
        return None
    return None


def few_samples(call: Call) -> Call | None:
    """The call with a few samples of its batch, if every tensor has the same first dimension and that is larger.

    None where integers may be positions in the batch: one that is out of range is no error to go on from on a GPU.
    """
    tensors = list(tensors_in((call.args, call.kwargs)))
    batches = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(batches) != 1 or max(batches) <= SAMPLES:
        return None
    if any(_may_be_positions(tensor) for tensor in tensors):
        return None
    return _mapped(lambda tensor: tensor.detach()[:SAMPLES], call)


def _may_be_positions(tensor: Tensor) -> bool:
    """Whether integers are all below the number of samples, and some of them would be out of range among a few."""
    if tensor.is_floating_point() or tensor.is_complex() or not tensor.numel():
        return False
    return SAMPLES <= int(tensor.max()) < len(tensor)


def replay(module: nn.Module, call: Call) -> list[Tensor]:
    """Floating point outputs of a call in evaluation mode; no global random state is used up, no other process is asked.

    Inputs go to the device of the module's parameters, and those in half precision, as autocast leaves them, to their
    dtype.
    """
    module.eval()
    like = first_floating(module)
    with torch.no_grad(), isolated_random_state(), alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a module without a Trainer warns when its forward logs
        args, kwargs = map_tensors(lambda tensor: _fresh(tensor, like), (call.args, call.kwargs))
        answer = module.get_submodule(call.module)(*args, **kwargs)
        return [t.detach().clone() for t in tensors_in(answer) if t.is_floating_point() or t.is_complex()]


def compare(reference: Sequence[Tensor], measured: Sequence[Tensor], names: Sequence[str]) -> Difference:
    """Largest relative difference between tensors of equal shapes; NaN and infinity equal themselves, integers must."""
    worst = NO_DIFFERENCE
    for name, a, b in zip(names, reference, measured, strict=True):
        exact = not (a.is_floating_point() or a.is_complex())
        if a.shape != b.shape or (exact and not torch.equal(a.cpu(), b.cpu())):
            return Difference(math.inf, math.inf, name)
        if exact or not a.numel():
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        # Not on the device: some have no float64.
        a, b = a.detach().cpu().to(wide), b.detach().cpu().to(wide)
        gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
        absolute = float(gap.max())
        scale = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
        relative = absolute / scale if scale else absolute
        if relative > worst.relative or not worst.name:
            worst = Difference(absolute, relative, name)
    return worst


def first_floating(module: nn.Module) -> Tensor:
    """The first floating-point parameter, for device and dtype of what goes in; an empty tensor where there is none."""
    return next((parameter for parameter in module.parameters() if parameter.is_floating_point()), torch.empty(0))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from tensors_in(getattr(value, entry.name))


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nested value with every tensor replaced; whatever else can change is copied deeply."""
    if isinstance(value, Tensor):
        return fn(value)
    if type(value) is dict:
        return {key: map_tensors(fn, item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(fn, item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(fn, item) for item in value))
    # Anything else keeps its class: a deep copy in which each tensor is what fn makes of it.
    return copy.deepcopy(value, {id(tensor): fn(tensor) for tensor in tensors_in(value)})


def _mapped(fn: Callable[[Tensor], Tensor], call: Call) -> Call:
    return Call(call.module, *map_tensors(fn, (call.args, call.kwargs)))


def _fresh(tensor: Tensor, like: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(like.device, like.dtype if half else tensor.dtype, copy=True)


@contextmanager
def isolated_random_state() -> Iterator[None]:
    """Seed every generator a forward may draw from, and put each back as it was."""
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    python_state = random.getstate()
    initialized = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if initialized else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        random.seed(0)
        if numpy:
            numpy.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
