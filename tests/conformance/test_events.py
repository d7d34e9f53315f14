"""Random networks, methods and sequences of events: φ, the weight and the twin of autograd always agree."""

from __future__ import annotations

import copy
import itertools
from typing import Any, get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sop import MajorityKernels, collapse_, expand_
from lightning_sop.reparam.majority import Draw, Granularity
from tests.conformance.references import ConvexMix, Reference
from tests.conformance.twin import Twin

sizes = st.integers(1, 4)


@st.composite
def perceptrons(draw: Any) -> tuple[nn.Module, Tensor]:
    widths = draw(st.lists(sizes, min_size=2, max_size=4))
    layers = [nn.Linear(a, b, bias=draw(st.booleans())) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh()))), torch.randn(3, widths[0])


@st.composite
def convolutions(draw: Any) -> tuple[nn.Module, Tensor]:
    groups, kernel, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    inputs, hidden, outputs = (groups * draw(sizes) for _ in range(3))
    options = {"groups": groups, "dilation": dilation}
    padding_mode = draw(st.sampled_from(["zeros", "circular"]))
    first = nn.Conv2d(inputs, hidden, kernel, padding=1, padding_mode=padding_mode, **options)
    second = nn.ConvTranspose2d(hidden, outputs, kernel, **options)
    return nn.Sequential(first, nn.Tanh(), second), torch.randn(2, inputs, 4, 4)


@st.composite
def methods(draw: Any) -> tuple[MajorityKernels, Reference]:
    k = draw(st.integers(1, 4))
    scale = draw(st.sampled_from([None, 1.0]))
    options = {
        "draw": draw(st.sampled_from(get_args(Draw))),
        "granularity": draw(st.sampled_from(get_args(Granularity))),
        "init": draw(st.sampled_from(["independent", "spread"])),
    }
    return MajorityKernels(k, gradient_scale=scale, **options), ConvexMix(k, scale)


class Play:
    """A network in training form and its twin, to which the same things happen."""

    def __init__(self, model: nn.Module, x: Tensor, method: MajorityKernels, reference: Reference, adam: bool) -> None:
        self.model, self.x = model.double(), x.double()
        plain = copy.deepcopy(self.model)
        self.optimizer = self._make(adam, self.model.parameters())
        self.engine = expand_(self.model, self.optimizer, method, seed=1)
        self.twin = Twin(plain, self.engine, reference)
        self.twin_optimizer = self._make(adam, self.twin.parameters())

    def _make(self, adam: bool, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01) if adam else torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    def step(self) -> None:
        self.model.train()
        self._update()

    def step_after_evaluating_and_saving(self) -> None:
        self.model.train()
        self._update(between=lambda: (self.model.eval(), self.model.state_dict(), self.model.train()))

    def _update(self, between: Any = lambda: None) -> None:
        losses = []
        for network, optimizer in ((self.twin, self.twin_optimizer), (self.model, self.optimizer)):
            optimizer.zero_grad()
            loss = (network(self.x) - 1).square().mean()
            between()
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
        self.twin_optimizer.step()
        self.optimizer.step()

    def eval(self) -> None:
        self.model.eval()
        expected = self.twin.collapsed()(self.x)
        torch.testing.assert_close(self.model(self.x), expected, rtol=1e-9, atol=1e-9)

    def train(self) -> None:
        self.model.train()

    def save(self) -> None:
        copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict()), self.engine.state_dict()

    def load_shifted(self) -> None:
        """A checkpoint whose weights are all larger by 0.1; kernels follow, and the next forward mixes again."""
        self.model.load_state_dict({name: tensor + 0.1 for name, tensor in self.model.state_dict().items()})
        self._shift_twin(0.1)
        self.model.train()

    def write(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.sub_(0.2)
        self._shift_twin(-0.2)

    def _shift_twin(self, delta: float) -> None:
        with torch.no_grad():
            for leaf in self.twin.parameters():
                leaf.add_(delta)

    def check(self) -> None:
        expected = self.twin.collapsed().state_dict()
        for name, tensor in self.model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9)
        parameters = list(self.model.parameters())
        assert [id(p) for g in self.optimizer.param_groups for p in g["params"]] == [id(p) for p in parameters]
        assert {id(p) for p in self.optimizer.state} <= {id(p) for p in parameters}


EVENTS = ["step", "step", "step_after_evaluating_and_saving", "eval", "train", "save", "load_shifted", "write"]


@settings(deadline=None, max_examples=120)
@given(
    network=st.one_of(perceptrons(), convolutions()),
    method=methods(),
    adam=st.booleans(),
    events=st.lists(st.sampled_from(EVENTS), max_size=12),
)
def test_any_sequence_of_events(network: Any, method: Any, adam: bool, events: list[str]) -> None:
    play = Play(*network, *method, adam)
    play.check()
    for event in events:
        getattr(play, event)()
        play.check()
    expected = play.twin.collapsed()
    torch.testing.assert_close(collapse_(play.model)(play.x), expected(play.x), rtol=1e-9, atol=1e-9)
