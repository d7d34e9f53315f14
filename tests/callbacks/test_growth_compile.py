"""Compiled networks grow and train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.callbacks.growing import Growable, every_epoch, grow, make, same_run
from tests.callbacks.helpers import fit, seeded

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # the compiler's own


class Compiled(Growable):
    """Compiles its network itself."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.net = torch.compile(self.net, backend="aot_eager")


class Watched(Growable):
    """Keeps no Python list in the compiled step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_network_compiled_in_init(tmp_path: Path) -> None:
    model, eager = seeded(Compiled), make()
    whole = fit(model, tmp_path, grow(6), every_epoch(tmp_path), max_epochs=4)
    fit(eager, tmp_path, grow(6), max_epochs=4)
    torch.testing.assert_close(model.losses, eager.losses, rtol=1e-3, atol=1e-4)
    assert "_orig_mod" in model.net._modules and model.net._orig_mod[0].weight.shape == (16, 10)
    for epoch in (0, 2):
        part = seeded(Compiled)
        run = fit(part, tmp_path / "x", grow(6), max_epochs=4, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert part.losses == model.losses[4 * (epoch + 1) :]
        assert same_run(run, whole)


def test_a_compiled_lightning_module(tmp_path: Path) -> None:
    plain, module = seeded(Watched), seeded(Watched)
    fit(plain, tmp_path, grow(6), max_epochs=4)
    fit(torch.compile(module, backend="aot_eager"), tmp_path, grow(6), max_epochs=4)
    assert module.net[0].weight.shape == (16, 10) == plain.net[0].weight.shape
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
