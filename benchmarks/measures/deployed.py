"""The collapsed network against the plain one: names and bytes of what is saved."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from measures.subjects import Subject

STEPS = 2


def measure_deployed(workload: str, factors: Sequence[int], device: str) -> list[dict[str, Any]]:
    """One row for each number of kernels: whether the keys are the plain network's, and bytes on disk of both."""
    plain = _trained(workload, "plain", 1, device)
    rows = []
    for factor in factors:
        ours = _trained(workload, "ours", factor, device)
        rows.append(
            {
                "model": workload,
                "factor": factor,
                "same_keys": list(ours.state_dict()) == list(plain.state_dict()),
                "disk_bytes": {"plain": _disk_bytes(plain), "ours": _disk_bytes(ours)},
            }
        )
    return rows


def _trained(workload: str, form: str, factor: int, device: str) -> nn.Module:
    subject = Subject(workload, form, factor, device)
    for _ in range(STEPS):
        subject.step()
    return subject.deploy()


def _disk_bytes(net: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return file.tell()
