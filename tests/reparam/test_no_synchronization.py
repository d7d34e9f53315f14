"""On an accelerator no step may make the host wait. The meta device has no values at all: asking for one raises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_sop import MajorityKernels, expand_
from lightning_sop.reparam import select


@pytest.mark.parametrize("granularity", ["layer", "step", "out_channel"])
def test_steps_read_no_value_back(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = select._obstacle
    monkeypatch.setattr(select, "_obstacle", lambda *a: None if own(*a) == "on the meta device" else own(*a))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine = expand_(model, optimizer, MajorityKernels(3, granularity=granularity))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(5, 8, device="meta")).sum().backward()
        optimizer.step()
        model.eval()
        model.train()
    assert engine.forms["0.weight"].phi[0].is_meta
    with pytest.raises(RuntimeError):  # the device does what this test relies on
        model[0].weight.sum().item()
