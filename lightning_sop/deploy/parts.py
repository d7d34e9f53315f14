"""Tensors that are not simply numbers in memory: sparse and quantized ones, by the tensors that they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

_COMPRESSED_ROWS = {torch.sparse_csr, torch.sparse_bsr}
_COMPRESSED_COLUMNS = {torch.sparse_csc, torch.sparse_bsc}
_BY_TENSOR = {torch.per_tensor_affine, torch.per_tensor_symmetric}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its numbers, and nothing else."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold all there is in a tensor of its shape, dtype and layout; itself if it is a plain one.

    Raises:
        TypeError: It is of a kind that is not known here.
    """
    tensor = tensor.detach()
    if is_plain(tensor):
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in _COMPRESSED_ROWS:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in _COMPRESSED_COLUMNS:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_quantized:
        if tensor.qscheme() in _BY_TENSOR:
            how = [torch.tensor(tensor.q_scale(), dtype=torch.float64), torch.tensor(tensor.q_zero_point())]
        else:
            axis = torch.tensor(tensor.q_per_channel_axis())
            how = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), axis]
        return [tensor.int_repr(), *how]
    raise TypeError(f"a tensor of layout {'nested' if tensor.is_nested else tensor.layout} cannot be taken apart")


def cpu_copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the CPU that holds no memory but its own; floating point tensors in another dtype, if one is given."""
    tensor = tensor.detach()
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if is_plain(tensor):
        return torch.empty(tensor.shape, dtype=target).copy_(tensor)
    parts(tensor)  # raises for kinds that could not be compared later
    return (tensor.cpu() if target is tensor.dtype else tensor.to("cpu", target)).clone()


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one kind and hold the same."""
    if a.shape != b.shape or a.layout != b.layout or a.is_quantized != b.is_quantized:
        return False
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))
