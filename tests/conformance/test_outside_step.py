"""Outside ``optimizer.step()`` a model and its optimizer are the plain ones, and no global random state is used."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lightning_sop import collapse_, expand_
from tests.conformance.methods import METHODS, Case
from tests.conformance.small import loss_of, small_net, train

every_method = pytest.mark.parametrize("case", METHODS, ids=str)


@every_method
def test_groups_state_and_parameters_are_the_plain_ones(case: Case) -> None:
    model = small_net()
    parameters = list(model.parameters())
    named = dict(model.named_parameters(remove_duplicate=False))
    decayed, others = parameters[:3], parameters[3:]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=1e-2)
    groups = [group["params"] for group in optimizer.param_groups]

    def check() -> None:
        assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
        assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == {n: id(p) for n, p in named.items()}
        assert all(group["params"] is members for group, members in zip(optimizer.param_groups, groups, strict=True))
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
            [id(p) for p in decayed],
            [id(p) for p in others],
        ]
        assert {id(p) for p in optimizer.state} <= {id(p) for p in parameters}

    expand_(model, optimizer, case.method)
    check()
    for _ in range(3):
        loss = loss_of(model)
        check()
        loss.backward()
        check()
        optimizer.step()
        check()
        assert set(optimizer.state) == set(parameters)
        for parameter, state in optimizer.state.items():
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        optimizer.zero_grad()
        check()
    collapse_(model)
    check()


@every_method
def test_saved_optimizer_state_is_that_of_a_plain_optimizer(case: Case) -> None:
    model, plain = small_net(), small_net()
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain))
    expand_(model, ours, case.method)
    train(model, ours, 2)
    train(plain, theirs, 2)

    def layout(state):
        return {index: {k: (type(v), v.shape, v.dtype) for k, v in entry.items()} for index, entry in state.items()}

    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    assert layout(ours.state_dict()["state"]) == layout(theirs.state_dict()["state"])


@every_method
def test_global_random_state_is_neither_used_nor_changed(case: Case) -> None:
    model = small_net()
    model.drop.p = 0.0  # the network's own use of it
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    expand_(model, optimizer, case.method)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        model.eval()
        model.state_dict()
        model.train()
    collapse_(model)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@every_method
def test_the_draws_depend_on_the_seed_alone(case: Case) -> None:
    losses = []
    for noise, seed in ((0, 4), (1, 4), (0, 5)):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        torch.manual_seed(noise)
        torch.rand(noise)
        expand_(model, optimizer, case.method, seed=seed)
        losses.append(train(model, optimizer, 3))
    assert losses[0] == losses[1] != losses[2]
