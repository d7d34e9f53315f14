"""Parameters that lie in one memory without being one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import UninitializedParameter


def overlapping(named: Iterable[tuple[str, nn.Parameter]]) -> dict[int, str]:
    """Which parameters' memory reaches into that of another one, such as ``b.weight.data = a.weight.data.t()``.

    What is written into one of them changes the other, so neither can be given a training form of its own. Parameters that
    are separate parts of one buffer (flattened RNN weights) do not overlap; interleaved ones count as if they did.

    Args:
        named: each parameter once, with a name.

    Returns:
        By ``id`` of a parameter the name of another one.
    """
    spans: dict[tuple[str, int], list[tuple[int, int, str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in named:
        if isinstance(parameter, UninitializedParameter) or parameter.is_meta or not parameter.numel():
            continue
        steps = zip(parameter.shape, parameter.stride(), strict=True)
        size = parameter.element_size() * (1 + sum((length - 1) * stride for length, stride in steps))
        first = parameter.data_ptr()
        spans[str(parameter.device), parameter.untyped_storage().data_ptr()].append((first, first + size, name, parameter))
    found: dict[int, str] = {}
    for group in spans.values():
        group.sort(key=lambda span: span[:2])
        reach = group[0]  # the one that goes furthest so far
        for span in group[1:]:
            if span[0] < reach[1]:
                found.setdefault(id(reach[3]), span[2])
                found.setdefault(id(span[3]), reach[2])
            reach = max(reach, span, key=lambda one: one[1])
    return found
