"""A module in place takes another one's shape, and keeps its identity."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sop.growth import FusionError
from lightning_sop.growth.adopt import adopt
from lightning_sop.growth.optimizers import enlist, replace_parameters
from tests.growth.architectures import ARCHITECTURES, Architecture
from tests.growth.test_fuse import outputs

every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@every
def test_a_network_computes_what_the_adopted_one_did(architecture: Architecture) -> None:
    small, wide = architecture.donor(0), architecture.wide()
    before = architecture.donor(1)
    modules, parameters = list(map(id, small.modules())), dict(small.named_parameters())
    expected = outputs(wide, architecture.probe)
    replaced = adopt(small, copy.deepcopy(wide), before)
    assert list(map(id, small.modules())) == modules
    torch.testing.assert_close(outputs(small, architecture.probe), expected)
    now = dict(small.named_parameters())
    for name, parameter in parameters.items():
        assert now[name] is replaced.get(parameter, parameter)
        assert (parameter.shape == now[name].shape) == (now[name] is parameter)


@dataclass
class Config:
    width: int
    name: str = "x"


class Plain:
    """Compares by identity."""

    def __init__(self, width: int) -> None:
        self.width, self.parts = width, [torch.zeros(3)]


class Holder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.half, self.text, self.sizes = width, width / 2, "text", [width, {"a": (width,)}]
        self.config, self.plain, self.constant = Config(width), Plain(width), Plain(1)
        self.layer, self.other = nn.Linear(3, width), nn.Linear(width, 2)
        self.modules_of_mine, self.weights = [self.layer], {"w": self.layer.weight}
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.register_buffer("statistics", torch.zeros(width))
        self.register_buffer("fixed", torch.ones(2), persistent=False)
        self.register_buffer("late", None if width < 8 else torch.ones(width))
        self.cache = torch.zeros(width)
        self.seen = 0
        self.function = lambda: width


def test_attributes_that_follow_the_width_and_no_others() -> None:
    live, grown, before = Holder(4), Holder(8), Holder(4)
    live.seen, live.text, live.fixed = 7, "changed", torch.full((2,), 5.0)
    kept = {name: getattr(live, name) for name in ("constant", "modules_of_mine", "weights", "optimizer", "function")}
    adopt(live, grown, before)
    assert (live.width, live.half, live.sizes, live.config.width, live.plain.width) == (8, 4.0, [8, {"a": (8,)}], 8, 8)
    assert (live.seen, live.text) == (7, "changed")
    assert all(getattr(live, name) is value for name, value in kept.items())
    assert live.statistics.shape == live.cache.shape == live.late.shape == (8,)
    assert torch.equal(live.fixed, torch.full((2,), 5.0))


def test_attributes_outside_of_a_part_stay() -> None:
    live, grown = nn.ModuleDict({"a": Holder(4), "b": Holder(4)}), nn.ModuleDict({"a": Holder(8), "b": Holder(4)})
    live["b"].seen, live["a"].seen = 3, 3
    tag = live["b"].constant
    adopt(live, grown, within=("a",))
    assert live["a"].width == 8 and live["b"].width == 4 and live["b"].seen == 3 and live["b"].constant is tag


def test_ties_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(5, width), nn.Linear(width, 5, bias=False)
            self.b.weight = self.a.weight

    live, grown = Tied(3), Tied(6)
    old = live.a.weight
    replaced = adopt(live, grown)
    assert live.a.weight is live.b.weight is replaced[old] and live.a.weight.shape == (5, 6)


def test_what_hangs_on_a_parameter_goes_along() -> None:
    live, grown = nn.Linear(3, 4), nn.Linear(3, 8)
    calls: list[Any] = []
    live.weight.tag = "mine"
    live.weight.requires_grad_(True)
    live.bias.requires_grad_(False)
    handle = live.weight.register_hook(lambda gradient: calls.append(tuple(gradient.shape)))
    late = live.weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("accumulated"))
    adopt(live, grown.half())
    assert live.weight.dtype == torch.float32 and live.weight.tag == "mine" and not live.bias.requires_grad
    live(torch.ones(1, 3)).sum().backward()
    assert calls == [(8, 3), "accumulated"]
    handle.remove()
    late.remove()
    live(torch.ones(1, 3)).sum().backward()
    assert calls == [(8, 3), "accumulated"]


def test_a_parameter_that_another_object_lists() -> None:
    """RNNs keep a second list of theirs."""
    live, grown = nn.LSTM(3, 4, num_layers=2), nn.LSTM(3, 8, num_layers=2)
    adopt(live, grown, nn.LSTM(3, 4, num_layers=2))
    assert [id(p) for p in live._flat_weights] == [id(p) for p in live.parameters()]
    live(torch.ones(2, 1, 3))[0].sum().backward()
    assert all(p.grad is not None for p in live.parameters())


def test_inside_compiled_wrappers() -> None:
    live: Any = nn.Sequential(torch.compile(nn.Linear(3, 4), backend="eager"), nn.Linear(4, 2))
    adopt(live, nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)))
    assert live[0]._orig_mod.out_features == 8 and live(torch.ones(1, 3)).shape == (1, 2)


# ------------------------------------------------------------------ the optimizer


def test_parameters_in_their_places() -> None:
    a, b, c, new = (nn.Parameter(torch.full((2,), float(n))) for n in range(4))
    extra = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([{"params": [a, b], "lr": 0.1}, {"params": [c, extra]}])
    for parameter in (a, b, c, extra):
        optimizer.state[parameter] = {"step": torch.tensor(1.0)}
    groups = optimizer.param_groups
    replace_parameters(optimizer, {b: new}, {new: {"step": torch.tensor(5.0)}}, restart=[a, new])
    assert optimizer.param_groups is groups
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(a), id(new)], [id(c), id(extra)]]
    assert {id(p) for p in optimizer.state} == {id(new), id(c), id(extra)}
    assert optimizer.state[new]["step"] == 5 and groups[0]["lr"] == 0.1


def names(optimizer: torch.optim.Optimizer, net: nn.Module) -> list[list[str]]:
    by_id = {id(p): name for name, p in net.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_new_blocks_join_the_groups_of_their_kind() -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    old = [p for name, p in net.named_parameters() if not name.startswith("1")]
    optimizer = torch.optim.SGD(
        [{"params": [p for p in old if p.dim() == 2]}, {"params": [p for p in old if p.dim() == 1]}], lr=1
    )
    new = [name for name, _ in net.named_parameters() if name.startswith("1")]
    for _ in range(2):  # a second time changes nothing
        enlist([optimizer], dict(net.named_parameters()), new)
        assert names(optimizer, net) == [["0.weight", "1.weight", "2.weight"], ["0.bias", "1.bias", "2.bias"]]


def test_new_blocks_beside_frozen_ones_are_in_no_group() -> None:
    net = nn.ModuleDict({"frozen": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.PReLU(2)})
    optimizer = torch.optim.SGD(net["head"].parameters(), lr=1)
    enlist([optimizer], dict(net.named_parameters()), ["frozen.1.weight", "frozen.1.bias"])
    assert names(optimizer, net) == [["head.weight"]]


def test_new_parameters_that_fit_nowhere_or_in_several_groups() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.PReLU()})
    groups = [{"params": [net["a"].weight]}, {"params": [net["a"].bias]}]
    optimizer = torch.optim.SGD(groups, lr=1)
    with pytest.raises(FusionError, match=r"b\.weight is new, and it is not clear which of 2 parameter groups"):
        enlist([optimizer], dict(net.named_parameters()), ["b.weight"])
    single = torch.optim.SGD(net["a"].parameters(), lr=1)
    enlist([single], dict(net.named_parameters()), ["b.weight"])
    assert names(single, net) == [["a.weight", "a.bias", "b.weight"]]
    assert isinstance(net["b"].weight, Tensor)
