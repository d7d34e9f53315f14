"""The symmetry trap: what copies can do that one network cannot. T10."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_sop.growth.trap import trap
from tests.growth.nets import CASES, INPUTS, Loss, any_weights, classify, copies, fused, gradients, mlp

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")  # torch.func.jvp's own


def trapped(small: Sequence[nn.Module], grown: nn.Module, loss: Loss, probe: Tensor, weights: Sequence[float]) -> float:
    ensemble = loss(lambda x: sum(w * net(x) for w, net in zip(weights, small, strict=True)))
    return trap(grown, gradients(loss(grown), grown), small, [gradients(ensemble, net) for net in small], probe)


@copies
@any_weights
def test_t10_copies_are_trapped(case: str, weights: tuple[float, ...]) -> None:
    """Nothing new at first order, with one exception: LayerNorm over copies of unequal weight (its mean is theirs alone)."""
    small, wide, loss, probe, _ = CASES[case]
    grown = wide()
    fused([small, small], grown, probe, weights=weights)
    found = trapped([small], grown, loss, probe, [1])
    if case == "mlp" or weights[0] == weights[1]:
        assert found < 1e-24
    else:
        assert found > 1e-6


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.LSTM(4, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.to(self.head.weight.dtype).unflatten(1, (4, 4)))[0][:, -1])


def test_t10_fast_kernels_without_a_forward_derivative_are_avoided() -> None:
    """An LSTM in float32: oneDNN's."""
    small, grown = Recurrent(6), Recurrent(12)
    fused([small, small], grown)
    assert trapped([small], grown, classify, INPUTS, [1]) < 1e-10
    assert torch.backends.mkldnn.enabled and torch.backends.cudnn.enabled


def jacobian(net: nn.Module) -> Tensor:
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    parts = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (INPUTS,)))(parameters)
    return torch.cat([part.reshape(INPUTS.shape[0] * 3, -1) for part in parts.values()], 1)


@pytest.mark.parametrize("norm", [False, True])
@any_weights
def test_t10_the_range_of_the_jacobian_says_the_same(norm: bool, weights: tuple[float, ...]) -> None:
    small, grown = mlp(4, norm=norm), mlp(8, norm=norm)
    fused([small, small], grown, weights=weights)
    both = torch.cat([jacobian(small), jacobian(grown)], 1)
    alone, together = (int(torch.linalg.matrix_rank(j, rtol=1e-10)) for j in (jacobian(small), both))
    assert (together > alone) == (norm and weights[0] != weights[1])


@pytest.mark.parametrize("growth", ["noise", "different_donors", "new_units"])
def test_t10_new_features_are_not_trapped(growth: str) -> None:
    small, grown = [mlp(7)], mlp(14)
    if growth == "noise":
        fused(small * 2, grown, weights=(0.5, 0.5), off_diagonal=0.1)
    elif growth == "new_units":
        fused(small, grown, widen="new")
    else:
        small = [mlp(7), mlp(7, 1)]
        fused(small, grown, weights=(0.5, 0.5))
    found = trapped(small, grown, classify, INPUTS, [1 / len(small)] * len(small))
    assert 1e-4 < found < 1


def test_t10_a_probe_that_anything_would_fit_is_refused() -> None:
    small, grown = mlp(7), mlp(14)
    fused([small, small], grown)
    g_s, g_b = gradients(classify(small), small), gradients(classify(grown), grown)
    with pytest.raises(ValueError, match="6 output values are too few for 6 tensors"):
        trap(grown, g_b, [small], [g_s], INPUTS[:2])
    zero, invalid = ({name: g_b[name] * factor for name in g_b} for factor in (0, math.nan))
    assert trap(grown, zero, [small], [g_s], INPUTS) == 0
    assert math.isnan(trap(grown, invalid, [small], [g_s], INPUTS))
    assert grown.training and small.training
