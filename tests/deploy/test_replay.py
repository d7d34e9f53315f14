from __future__ import annotations

import random
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_sop.deploy.replay import Call, compare, few_samples, map_tensors, record, replay, tensors_in


@dataclass
class Box:
    value: Tensor
    name: str = "box"


Pair = namedtuple("Pair", "left right")


def test_a_batch_can_be_cut_to_a_few_samples():
    call = record("", (torch.randn(32, 3),), {"mask": torch.ones(32)})
    assert call.shapes == [[32, 3], [32]]
    assert few_samples(call).shapes == [[4, 3], [4]]


def test_batches_with_positions_in_them_are_not_cut():
    inputs = torch.randn(12, 4)
    for last, cut in ((11, False), (4, False), (3, True), (12, True), (50_000, True)):  # a vocabulary is larger
        call = Call("", (inputs, torch.tensor([0] * 11 + [last])), {})
        assert (few_samples(call) is not None) == cut


def test_inputs_whose_first_dimensions_differ_are_kept_whole():
    assert few_samples(record("", (torch.randn(32, 3), torch.ones(2, 99)), {})) is None


def test_large_inputs_are_cut_before_they_are_kept():
    assert record("", (torch.empty(1000, 2**14),), {}).shapes == [[4, 2**14]]


@pytest.mark.parametrize(
    "args", [(torch.ones(2, 2**21), torch.ones(3)), (), (torch.ones(4), (i for i in "ab"))], ids=["big", "none", "odd"]
)
def test_what_cannot_be_kept_is_not_recorded(args):
    assert record("", args, {}) is None


def test_recorded_inputs_do_not_follow_the_originals():
    x = torch.ones(2, requires_grad=True)
    call = record("", (x * 1,), {"options": {"deep": [x]}})
    with torch.no_grad():
        x += 1
    kept = list(tensors_in((call.args, call.kwargs)))
    assert [t.tolist() for t in kept] == [[1, 1], [1, 1]]
    assert not any(t.requires_grad for t in kept)


def test_every_kind_of_container_is_mapped():
    x = torch.ones(2)
    value = {"a": [x], "b": (x, "text"), "c": Pair(x, 1), "d": Box(x), "e": pack_sequence([x])}
    doubled = map_tensors(lambda t: t * 2 if t.is_floating_point() else t, value)
    assert doubled["a"][0].sum() == doubled["b"][0].sum() == doubled["c"].left.sum() == doubled["d"].value.sum() == 4
    assert (type(doubled["c"]), type(doubled["d"]), type(doubled["e"])) == (Pair, Box, type(value["e"]))
    assert x.sum() == 2


class Draws(nn.Module):
    """Random in evaluation too, changes its inputs, and answers in a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Box:
        x += random.random() + np.random.rand()
        return Box(self.scale * x + torch.randn(3))


def test_replay_is_repeatable_and_touches_no_global_random_state():
    call = Call("", (torch.zeros(3),), {})
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, second = replay(Draws(), call), replay(Draws(), call)
    assert torch.equal(first[0], second[0])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_half_precision_inputs_of_autocast_meet_full_precision_weights():
    assert replay(nn.Linear(2, 2), Call("", (torch.ones(1, 2).bfloat16(),), {}))[0].dtype is torch.float32


def test_compare():
    nan, inf = float("nan"), float("inf")

    def relative(a, b):
        return compare([torch.tensor(a)], [torch.tensor(b)], ["x"]).relative

    assert relative([1.0, nan, inf], [1.0, nan, inf]) == 0
    assert relative([1.0, nan], [1.0, 2.0]) == inf
    assert relative([1.0, 2.0], [1.0, inf]) == inf
    assert relative([4.0, 0.0], [4.0, 1.0]) == 0.25
    assert relative([0.0], [0.5]) == 0.5
    assert relative([[1.0]], [1.0]) == inf
    assert compare([], [], []).exceeds(0.0) is False
    worst = compare([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.ones(2) * 1.5], ["a", "b"])
    assert worst == (0.5, 0.5, "b")
    assert compare([torch.ones(1)], [torch.full((1,), nan)], ["a"]).exceeds(1e9)
