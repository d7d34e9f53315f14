"""The parts of a network that own tensors, and what each axis of their tensors means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

AxisKind = Literal["out", "in", "same", "keep"]


@dataclass(frozen=True)
class Role:
    """The meaning of one axis of a tensor.

    Attributes:
        kind: ``"out"``: output units; ``"in"``: summed over, along the units of an input; ``"same"``: works on the units of
            the input one by one (norms); ``"keep"``: does not grow (kernel sizes, rows of an embedding).
        source: for ``"in"``: the number of the input tensor, or -1 for units made inside the module itself.
        chunks: equal parts in which the donors lie side by side (3 for q|k|v); 0 where nothing is known.
    """

    kind: AxisKind
    source: int = 0
    chunks: int = 0


OUT, IN, SAME, KEEP = Role("out"), Role("in"), Role("same"), Role("keep")
Roles = tuple[Role, ...]
_ATOMIC = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module itself; of an attention layer or RNN with all it holds."""
    if isinstance(module, _ATOMIC):
        yield from module.named_parameters(remove_duplicate=False)
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor


def find_units(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The units of a model by path: modules that are probed as a whole, because only they themselves use their tensors."""
    inner = [(f"{path}.{name}" if path else name, child) for name, child in model.named_children()]
    if (
        isinstance(model, _ATOMIC)
        or (is_norm(model) and not inner)
        or (model._parameters and not any(True for _, child in inner for _ in child.parameters()))
    ):
        yield path, model
    else:
        for name, child in inner:
            yield from find_units(child, name)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes (by torch's types, or by its name)."""
    known = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or type(module).__name__.endswith("Norm")


def roles_of(module: nn.Module, name: str, tensor: Tensor, swapped: bool = False) -> Roles:
    """What the axes of a unit's tensor mean.

    Args:
        module: the unit.
        name: the tensor's name in it.
        tensor: as it is in the grown model.
        swapped: for a module of unknown type: its matrices hold inputs before outputs.
    """
    kept = (KEEP,) * max(0, tensor.dim() - 2)
    if tensor.dim() == 0:
        return ()
    if isinstance(module, nn.MultiheadAttention):
        return _attention(name, tensor)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent(module, name, tensor)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return KEEP, OUT
    if isinstance(module, nn.Bilinear):
        return (OUT, IN, Role("in", 1)) if tensor.dim() == 3 else (OUT,)
    if is_norm(module) or isinstance(module, nn.PReLU):
        return (SAME,) * tensor.dim()
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        return (OUT,) if tensor.dim() == 1 else (IN, OUT, *kept)
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return (OUT,) if tensor.dim() == 1 else (OUT, IN, *kept)
    if tensor.dim() == 1:
        return (OUT,)
    swapped ^= type(module).__name__ == "Conv1D"  # transformers' linear layer
    return (*kept, IN, OUT) if swapped else (*kept, OUT, IN)


def known(module: nn.Module) -> bool:
    """Whether the roles of a unit's tensors are known from its type."""
    types = (nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.PReLU, nn.Linear, nn.modules.conv._ConvNd, *_ATOMIC)
    return isinstance(module, types) or is_norm(module) or type(module).__name__ == "Conv1D"


def _attention(name: str, tensor: Tensor) -> Roles:
    heads = Role("out", chunks=1)
    if name.startswith("in_proj"):
        heads = Role("out", chunks=3)
    if name in ("bias_k", "bias_v"):
        return KEEP, KEEP, heads
    if name.startswith("out_proj"):
        return (OUT, Role("in", -1, chunks=1)) if tensor.dim() == 2 else (OUT,)
    source = {"k_proj_weight": 1, "v_proj_weight": 2}.get(name, 0)
    return (heads, Role("in", source)) if tensor.dim() == 2 else (heads,)


def _recurrent(module: nn.RNNBase | nn.RNNCellBase, name: str, tensor: Tensor) -> Roles:
    kind = type(module).__name__.upper()
    gates = Role("out", chunks=4 if "LSTM" in kind else 3 if "GRU" in kind else 1)
    if tensor.dim() == 1:
        return (gates,)
    if name.startswith("weight_hr"):
        return Role("out", chunks=1), Role("in", -1, chunks=1)
    first = isinstance(module, nn.RNNCellBase) or name.removesuffix("_reverse") == "weight_ih_l0"
    if name.startswith("weight_ih"):
        directions = 2 if getattr(module, "bidirectional", False) else 1
        return gates, (IN if first else Role("in", -1, chunks=directions))
    return gates, Role("in", -1, chunks=1)
