"""Bytes that DistributedDataParallel reduces per step, counted by a communication hook in two processes."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from measures.subjects import FORMS, Subject

RANKS = 2
STEPS = 3


class Counter:
    """A communication hook that averages the gradients as DDP would, and counts their bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def reduce(self, group: Any, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        """Count one bucket and send it on its way."""  # DDP reads these annotations, so they cannot be strings
        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    def wrap(self, net: nn.Module) -> nn.Module:
        """The network in DDP, with this hook."""
        parallel = DistributedDataParallel(net)
        parallel.register_comm_hook(None, self.reduce)
        return parallel


def bytes_per_step(workload: str, form: str, factor: int) -> int:
    """Bytes reduced in one step; the same in every step, or an error."""
    counter = Counter()
    subject = Subject(workload, form, factor, wrap=counter.wrap)
    counts = []
    for _ in range(STEPS):
        counter.bytes = 0
        subject.step()
        counts.append(counter.bytes)
    if len(set(counts)) > 1:
        raise RuntimeError(f"{workload}, {form}, factor {factor}: the steps reduced {counts} bytes")
    return counts[0]


def measure_traffic(workloads: Sequence[str], factors: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each network and number of kernels: bytes per step of each form."""
    with tempfile.TemporaryDirectory() as folder:
        answer = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(_rank, (tuple(workloads), tuple(factors), folder, answer), nprocs=RANKS)
        rows: list[dict[str, Any]] = answer.get()
    return rows


def _rank(rank: int, workloads: Sequence[str], factors: Sequence[int], folder: str, answer: Any) -> None:
    torch.set_num_threads(1)
    meeting = Path(folder, "meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    rows = []
    for workload in workloads:
        plain = bytes_per_step(workload, "plain", 1)
        for factor in factors:
            counts = {form: bytes_per_step(workload, form, factor) for form in FORMS if form != "plain"}
            rows.append({"model": workload, "factor": factor, "bytes": {"plain": plain, **counts}})
    if rank == 0:
        answer.put(rows)
    distributed.destroy_process_group()
