"""Wider and overcomplete networks, and what is left of them when they are deployed."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.quality.baselines.overcomplete import collapsed_state, expand, inner_units
from benchmarks.quality.baselines.wide import facility_location, hidden_units, reduce, size, widen
from lightning_sop.zoo import MLP, Decoder, ResNet
from tests.test_quality import random_state  # noqa: F401


@pytest.mark.parametrize("network", ["mlp", "resnet", "decoder"])
def test_expanded_networks_begin_and_end_as_the_plain_one(network):
    torch.manual_seed(0)
    plain = {
        "mlp": lambda: MLP((1, 4, 4), 3, width=6),
        "resnet": lambda: ResNet((1, 8, 8), 3, width=4),
        "decoder": lambda: Decoder(7, 5, width=8, depth=1, heads=2),
    }[network]().eval()
    inputs = (
        torch.randint(7, (2, 5)) if network == "decoder" else torch.randn(2, 1, *([4, 4] if network == "mlp" else [8, 8]))
    )
    before, names = plain(inputs).detach(), list(plain.state_dict())
    old = sum(parameter.numel() for parameter in plain.parameters())
    added = expand(plain, 4)
    assert torch.allclose(plain(inputs), before, atol=1e-4)
    assert added > 1.5 * old if network == "mlp" else added > 0
    assert sum(parameter.numel() for parameter in plain.parameters()) == old + added
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = collapsed_state(plain)
    assert sorted(state) == sorted(names)
    twin = {
        "mlp": lambda: MLP((1, 4, 4), 3, width=6),
        "resnet": lambda: ResNet((1, 8, 8), 3, width=4),
        "decoder": lambda: Decoder(7, 5, width=8, depth=1, heads=2),
    }[network]().eval()
    twin.load_state_dict(state)
    assert torch.allclose(twin(inputs), plain(inputs), atol=1e-4)
    if network == "decoder":
        assert twin.head.weight is twin.embedding.weight


def test_inner_units_hold_every_weight():
    for shape in (torch.Size([10, 256]), torch.Size([256, 784]), torch.Size([16, 8, 3, 3])):
        rows_, columns = shape[0], shape[1:].numel()
        inner = inner_units(shape, 4)
        assert inner >= min(rows_, columns)
        assert inner * (rows_ + columns) == pytest.approx(4 * rows_ * columns, rel=0.05)


def test_facility_location_is_greedy():
    torch.manual_seed(0)
    similarity = torch.rand(7, 7)
    value = lambda chosen: float(similarity[:, chosen].max(1).values.sum()) if chosen else 0.0  # noqa: E731
    chosen = []
    for _ in range(3):
        chosen.append(max((j for j in range(7) if j not in chosen), key=lambda j: value([*chosen, j])))
    assert facility_location(similarity, 3).tolist() == sorted(chosen)
    best = max(value(list(some)) for some in itertools.combinations(range(7), 3))
    assert value(chosen) >= (1 - 1 / np.e) * best


def pairs(network):
    """Make the second half of each group's units multiples of the first half: nothing is lost without them."""
    with torch.no_grad():
        for units in hidden_units(network):
            half = size(network, units) // 2
            into = network.get_submodule(units.into)
            factor = 0.5 + torch.rand(half)
            into.weight[half:] = into.weight[:half] * factor.view(-1, *[1] * (into.weight.dim() - 1))
            if into.bias is not None:
                into.bias[half:] = into.bias[:half] * factor
            norm = network.get_submodule(units.norm) if units.norm else None
            if norm is not None:
                norm.weight[half:], norm.bias[half:] = norm.weight[:half] * factor, norm.bias[:half] * factor
                norm.running_mean[half:] = norm.running_mean[:half] * factor
                norm.running_var[half:] = norm.running_var[:half] * factor**2


@pytest.mark.parametrize("network", ["mlp", "resnet"])
def test_a_wide_network_with_copied_units_is_reduced_without_loss(network):
    torch.manual_seed(0)
    make = (lambda: MLP((1, 4, 4), 3, width=6)) if network == "mlp" else (lambda: ResNet((1, 8, 8), 3, width=4))
    side = 4 if network == "mlp" else 8
    small, wide = make(), make()
    widen(wide)
    for units in hidden_units(small):
        assert size(wide, units) == 2 * size(small, units)
    inputs = [torch.randn(32, 1, side, side) for _ in range(4)]
    wide.train()
    wide(inputs[0])
    pairs(wide)
    torch.optim.swa_utils.update_bn(inputs, wide)
    wide.eval()
    before = wide(inputs[1]).detach()
    small.load_state_dict(reduce(wide, small, inputs))
    assert torch.allclose(small.eval()(inputs[1]), before, atol=2e-3 * float(before.abs().max()))


def test_outgoing_weights_are_refitted_by_least_squares():
    torch.manual_seed(1)
    small, wide = Decoder(7, 5, width=8, depth=1, heads=2), Decoder(7, 5, width=8, depth=1, heads=2)
    widen(wide)
    tokens = [torch.randint(7, (16, 5)) for _ in range(3)]
    seen = []
    layer = wide.layers[0].linear2
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
    for part in tokens:
        wide(part)
    handle.remove()
    units = torch.cat(seen).double().numpy()
    wanted = units @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    into = wide.layers[0].linear1.weight.detach().clone()
    small.load_state_dict(reduce(wide, small, tokens))
    kept = [int((into == row).all(1).nonzero()) for row in small.layers[0].linear1.weight]
    assert len(set(kept)) == 32
    a = np.concatenate([units[:, kept], np.ones((len(units), 1))], 1)
    best = a @ np.linalg.lstsq(a, wanted, rcond=None)[0]
    ours = units[:, kept] @ small.layers[0].linear2.weight.detach().double().numpy().T
    ours = ours + small.layers[0].linear2.bias.detach().double().numpy()
    assert np.abs(ours - best).max() < 1e-3 * np.abs(wanted).max()
