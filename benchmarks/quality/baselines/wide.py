"""Networks with wider hidden layers, and their reduction to a few units: facility location, then least squares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.quality.config import StudyError
from lightning_sop.zoo import MLP
from lightning_sop.zoo.nets import ResidualBlock


@dataclass(frozen=True)
class Units:
    """Hidden units that can be more or fewer without a change elsewhere, by paths of modules.

    Attributes:
        into: layer whose outputs they are.
        norm: BatchNorm of those outputs, or "".
        out_of: layer whose inputs they are, after the nonlinearity.
    """

    into: str
    norm: str
    out_of: str


def hidden_units(network: nn.Module) -> Iterator[Units]:
    """Hidden layers of perceptrons, channels inside residual blocks, feed-forward units of transformers; front to back."""
    for path, part in network.named_modules():
        dot = f"{path}." if path else ""
        if isinstance(part, MLP):
            layers = [*(f"{dot}hidden.{number}" for number in range(len(part.hidden))), f"{dot}head"]
            yield from (Units(into, "", out_of) for into, out_of in pairwise(layers))
        elif isinstance(part, ResidualBlock):
            yield Units(f"{dot}conv1", f"{dot}norm1", f"{dot}conv2")
        elif isinstance(part, nn.TransformerEncoderLayer):
            yield Units(f"{dot}linear1", "", f"{dot}linear2")


def widen(network: nn.Module, factor: float = 2) -> None:
    """Multiply the number of all hidden units; their layers are drawn anew, as torch draws them.

    Raises:
        StudyError: there are none that this module knows.
    """
    found = list(hidden_units(network))
    if not found:
        raise StudyError(
            f"{type(network).__name__} has no hidden units that can be widened: it takes perceptrons and residual blocks of "
            "the zoo, and torch.nn.TransformerEncoderLayer"
        )
    for units in found:
        count = round(factor * size(network, units))
        _replace(network, units.into, outputs=count)
        if units.norm:
            old = network.get_submodule(units.norm)
            _put(network, units.norm, nn.BatchNorm2d(count).to(next(old.parameters()).device))
        _replace(network, units.out_of, inputs=count)


def size(network: nn.Module, units: Units) -> int:
    """How many there are."""
    return len(cast(Tensor, network.get_submodule(units.into).weight))


def _replace(network: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None) -> None:
    old = cast(Any, network.get_submodule(path))
    bias = old.bias is not None
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        channels = inputs or old.in_channels, outputs or old.out_channels
        new = nn.Conv2d(*channels, cast(Any, old.kernel_size), cast(Any, old.stride), cast(Any, old.padding), bias=bias)
    else:
        new = nn.Linear(inputs or old.in_features, outputs or old.out_features, bias=bias)
    _put(network, path, new.to(old.weight.device))


def _put(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


# ---------------------------------------------------------------------- reduction


def reduce(wide: nn.Module, small: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The state of the small network that does most nearly what the wide one does, group by group from the front.

    Args:
        wide: a trained network, which is reduced in place.
        small: has the sizes that are wanted.
        batches: inputs of the training set.
    """
    inputs = list(batches)
    for units in hidden_units(small):
        wanted = size(small, units)
        layer = wide.get_submodule(units.out_of)
        gram = _gram(wide, layer, inputs)
        kept = facility_location(_explained(gram, layer), wanted)
        _cut(wide, units, kept, refitted(gram, layer, kept))
    if any(isinstance(part, _BatchNorm) for part in wide.modules()):
        torch.optim.swa_utils.update_bn(inputs, wide)
    return {name: tensor.detach().clone() for name, tensor in wide.state_dict().items()}


def rows_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs as one row for each output position, columns as in the flattened weight; a constant column for a bias."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(inputs, cast(Any, layer.kernel_size), padding=cast(Any, layer.padding), stride=layer.stride)
        rows = patches.transpose(1, 2).flatten(0, 1)
    else:
        rows = inputs.flatten(0, -2)
    return rows if layer.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


@torch.no_grad()
def _gram(network: nn.Module, layer: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Sum of products of all pairs of a layer's inputs, over positions, in double precision."""
    total: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = rows_of(layer, args[0].detach())
        product = (rows.T @ rows).double()
        total[:] = [total[0] + product] if total else [product]

    training = network.training
    network.eval()
    handle = layer.register_forward_pre_hook(add)
    try:
        with torch.enable_grad():  # transformers' fast path for inference calls no layers
            for batch in inputs:
                network(batch)
    finally:
        handle.remove()
        network.train(training)
    return total[0].detach()


def _columns(layer: nn.Module, units: Tensor) -> Tensor:
    """Columns of the flattened weight that belong to units."""
    width = cast(Tensor, layer.weight)[0, 0].numel()
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _explained(gram: Tensor, layer: nn.Module) -> Tensor:
    """(unit i, unit j): how much of what i sends on could be sent by j: explained energy times the squared outgoing weight.

    Patches are taken at their centre.
    """
    weight = cast(Tensor, layer.weight).detach().double()
    count, width = weight.shape[1], weight[0, 0].numel()
    centre = torch.arange(count, device=gram.device) * width + width // 2
    products = gram[centre][:, centre]
    energy = products.diagonal().clamp_min(1e-12 * float(products.diagonal().max()) + 1e-300)
    return products.square() / energy * weight.square().transpose(0, 1).flatten(1).sum(1)[:, None]


def facility_location(similarity: Tensor, count: int) -> Tensor:
    """Greedy choice of columns S for the largest Σ_i max_{j in S} similarity_ij (Nemhauser et al., 1978), in order."""
    best = similarity.new_zeros(len(similarity))
    chosen: list[int] = []
    for _ in range(count):
        gains = (similarity - best[:, None]).clamp_min(0).sum(0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        best = torch.maximum(best, similarity[:, chosen[-1]])
    return torch.tensor(sorted(chosen), device=similarity.device)


def refitted(gram: Tensor, layer: nn.Module, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with which the kept inputs give most nearly the outputs of all: least squares, with a slight ridge."""
    weight, bias = cast(Tensor, layer.weight).detach(), cast("Tensor | None", layer.bias)
    columns, targets = _columns(layer, kept), weight.flatten(1).double()
    if bias is not None:
        columns = torch.cat([columns, columns.new_tensor([targets.shape[1]])])
        targets = torch.cat([targets, bias.detach().double()[:, None]], 1)
    inner = gram[columns][:, columns]
    ridge = 1e-8 * float(inner.diagonal().mean()) * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    found = torch.linalg.solve(inner + ridge, gram[columns] @ targets.T).T.to(weight.dtype)
    shape = (len(weight), len(kept), *weight.shape[2:])
    return (found.view(shape), None) if bias is None else (found[:, :-1].reshape(shape), found[:, -1].clone())


@torch.no_grad()
def _cut(network: nn.Module, units: Units, kept: Tensor, outgoing: tuple[Tensor, Tensor | None]) -> None:
    for path in filter(None, (units.into, units.norm)):
        part = network.get_submodule(path)
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach()[kept].clone()))
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.dim():
                setattr(part, name, buffer[kept].clone())
    layer = cast(Any, network.get_submodule(units.out_of))
    layer.weight = nn.Parameter(outgoing[0])
    if outgoing[1] is not None:
        layer.bias = nn.Parameter(outgoing[1])
    for path, name in ((units.into, "out"), (units.out_of, "in"), (units.norm, "num")):
        for attribute in (f"{name}_features", f"{name}_channels"):
            if path and hasattr(network.get_submodule(path), attribute):
                setattr(network.get_submodule(path), attribute, len(kept))
