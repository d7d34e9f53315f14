"""FLOPs of networks: of matrix products, convolutions, attention and recurrent layers, as torch's counter gives them.

It counts neither what optimizers do nor operations element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker


class Flops(NamedTuple):
    """Of a call with its backward, and of the call alone."""

    total: float
    forward: float


def flops_of(fn: Callable[[], Any], backward: Callable[[Tensor], Any] = Tensor.backward) -> Flops:
    """Call a function, and go backward from the tensor that it returns, if it returns one with a graph.

    Args:
        fn: runs the networks. Gradients accumulate in their parameters, so let it run copies.
        backward: how to go backward from a scalar.
    """
    with flop_counter() as counter:
        result = fn()
        forward = float(counter.get_total_flops())
        if isinstance(result, Tensor) and result.requires_grad:
            backward(result)
    return Flops(float(counter.get_total_flops()), forward)


def estimated_flops(parameters: int, samples: int = 1) -> Flops:
    """For networks none of whose operations is counted: each parameter is taken to be used once for each sample."""
    return Flops(6.0 * parameters * samples, 2.0 * parameters * samples)


def flop_counter() -> FlopCounterMode:
    """The counter of torch, without its table, and with attention and recurrent layers on every device."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(_further_operations()))
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(ModuleTracker):
    """Counts nothing by module: the hooks for that fail in ``autograd.grad`` where a parameter is a module's input."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def _further_operations() -> Iterator[tuple[Any, Callable[..., int]]]:
    formulas: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "mkldnn_rnn_layer": lambda inputs, first, second, *_, **__: _recurrent(inputs, (first, second)),
        "mkldnn_rnn_layer_backward": lambda inputs, first, second, *_, **__: 2 * _recurrent(inputs, (first, second)),
        "_cudnn_rnn": lambda inputs, weights, *_, **__: _recurrent(inputs, weights),
        "_cudnn_rnn_backward": lambda inputs, weights, *_, **__: 2 * _recurrent(inputs, weights),
    }
    for name, formula in formulas.items():
        if hasattr(torch.ops.aten, name):
            yield getattr(torch.ops.aten, name), formula


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]
    return flops


def _attention_backward(gradient: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_backward_flop_count(gradient, q, k, v)  # type: ignore[no-untyped-call]
    return flops


def _recurrent(inputs: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """Every matrix is used once for each element of a sequence."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)
