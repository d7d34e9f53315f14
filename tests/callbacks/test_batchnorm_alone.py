"""The re-estimation of BatchNorm statistics by itself: what it records, and what it leaves as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from lightning_sop.callbacks.batchnorm import BatchNormReestimation
from tests.callbacks.helpers import network, same_tensors


class Counts(nn.Module):
    """A buffer that every forward changes, and a random number from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return inputs + 0 * torch.rand(())


def recorded(net: nn.Module) -> BatchNormReestimation:
    """Has seen two steps of a network in a module of its own."""
    root = nn.Module()
    root.net = net
    ours = BatchNormReestimation(3)
    ours.attach(root)
    for _ in range(2):
        ours.begin_step()
        net(torch.randn(8, 10, requires_grad=True)).sum().backward()
    ours.root = root
    return ours


def test_everything_else_is_left_as_it_was() -> None:
    net = nn.Sequential(Counts(), *network(), nn.BatchNorm1d(5, momentum=0.3))
    frozen = net[2].eval()
    ours = recorded(net)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    ours.run(ours.root)
    after = net.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"6.running_mean", "6.running_var"}  # the other one was frozen
    assert (net[6].momentum, net[6].training, frozen.training, net[4].training) == (0.3, True, False, True)
    assert torch.equal(random, torch.get_rng_state())


class Doubles(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mul_(2)


def test_inputs_that_the_network_changes_are_used_again_as_they_were() -> None:
    root, ours = nn.Sequential(Doubles(), nn.BatchNorm1d(10)), BatchNormReestimation(3)
    ours.attach(root)
    batches = [torch.randn(8, 10) for _ in range(3)]
    for batch in batches:
        ours.begin_step()
        root(batch.clone())
        ours.run(root)
    found = dict(root.named_buffers())
    twin = nn.Sequential(Doubles(), nn.BatchNorm1d(10))
    update_bn(batches, twin)
    assert same_tensors(found, dict(twin.named_buffers()))  # three batches were tracked in training, too


def test_a_failure_leaves_the_statistics_as_they_were() -> None:
    net = network()
    ours = recorded(net)
    before = copy.deepcopy(net.state_dict())
    net[4].forward = None
    with pytest.raises(TypeError, match="not callable"):
        ours.run(ours.root)
    assert same_tensors(before, dict(net.state_dict()))
    assert all(module.training for module in net.modules())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = network(), reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.inner, inputs, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_repeats_is_seen_once(reentrant: bool) -> None:
    ours = recorded(Checkpointed(reentrant))
    assert [len(step) for step in ours._steps] == [1, 1]


def test_copies_watch_nothing() -> None:
    net = network()
    ours = recorded(net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin(torch.randn(8, 10))
    twin = copy.deepcopy(ours)
    assert [len(step) for step in ours._steps] == [1, 1] and not twin._steps
    ours.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
