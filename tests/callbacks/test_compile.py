"""Compiled modules: one graph, no break, no recompilation, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.callbacks.helpers import Classifier, fit, overparam, seeded

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # the compiler's own


class Compiled(Classifier):
    """Compiles its network itself."""

    def __init__(self) -> None:
        super().__init__(shuffle=False, dropout=0.0)
        self.net = torch.compile(self.net, backend="aot_eager")


class Watched(Classifier):
    """Keeps no Python list in the compiled step."""

    def __init__(self) -> None:
        super().__init__(shuffle=False, dropout=0.0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_network_is_one_graph_over_fifty_steps(tmp_path: Path) -> None:
    torch._dynamo.config.error_on_recompile = True
    try:
        compiled = seeded(Compiled)
        fit(compiled, tmp_path, overparam(3, seed=1), max_epochs=13, limit_val_batches=0)
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert len(compiled.losses) == 52
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    eager = seeded(Classifier, shuffle=False, dropout=0.0)
    fit(eager, tmp_path, overparam(3, seed=1), max_epochs=13, limit_val_batches=0)
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-3, atol=1e-4)


def test_compiled_lightning_module(tmp_path: Path) -> None:
    graphs = []
    for callbacks in ([], [overparam(3)]):
        torch._dynamo.reset()
        counters.clear()
        model = torch.compile(seeded(Watched), backend="aot_eager")
        fit(model, tmp_path, *callbacks, max_epochs=13, limit_val_batches=0)
        graphs.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("whole", [False, True], ids=["network", "module"])
def test_compiled_code_sees_each_step_s_mix(whole: bool, tmp_path: Path) -> None:
    """What the compiler keeps of the first step must not be the first step's weights."""
    eager = seeded(Classifier, shuffle=False, dropout=0.0)
    fit(eager, tmp_path, overparam(3, seed=1))
    if whole:
        compiled = torch.compile(seeded(Classifier, shuffle=False, dropout=0.0), backend="aot_eager")
    else:
        compiled = seeded(Compiled)
    fit(compiled, tmp_path, overparam(3, seed=1))
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-4, atol=1e-5)
    values = [list(model.state_dict().values()) for model in (compiled, eager)]  # the compiler renames them
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing(tmp_path: Path) -> None:
    """The forward that backward repeats sees the same mix."""

    class Checkpointed(Classifier):
        def __init__(self, use: bool) -> None:
            super().__init__(shuffle=False, dropout=0.0)
            self.net[1] = nn.Identity()
            self.use = use

        def forward(self, inputs: Tensor) -> Tensor:
            return checkpoint(self.net, inputs, use_reentrant=False) if self.use else self.net(inputs)

    with_it, without = seeded(Checkpointed, True), seeded(Checkpointed, False)
    fit(with_it, tmp_path, overparam(3, seed=1))
    fit(without, tmp_path, overparam(3, seed=1))
    assert with_it.losses == without.losses
