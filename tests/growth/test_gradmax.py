"""New units by GradMax: against the singular vectors computed by hand, against random draws, and through architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop.deploy.replay import tensors_in
from lightning_sop.growth import Fusion, FusionError, fuse
from lightning_sop.growth.fuse import as_calls
from lightning_sop.growth.new_units import Meter
from tests.growth.architectures import ARCHITECTURES, IMAGES, TOKENS, Architecture, hugging_face, trained
from tests.growth.toy import data, mean_square

Loss = Callable[[nn.Module], Tensor]


def toward_noise(probe: Any) -> Loss:
    """The mean squared distance of a network's first output to random numbers."""
    targets: dict[torch.Size, Tensor] = {}

    def loss(network: nn.Module) -> Tensor:
        (call,) = as_calls(probe)
        output = next(t for t in tensors_in(network(*call.args, **call.kwargs)) if t.is_floating_point())
        if output.shape not in targets:
            targets[output.shape] = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
        return F.mse_loss(output, targets[output.shape].to(output))

    return loss


def widened(small: nn.Module, wide: nn.Module, probe: Any, loss: Loss | None = None, **options: Any) -> Fusion:
    return fuse([small], wide, probe, widen="gradmax", loss=loss or toward_noise(probe), **options)


def incoming_gradient(network: nn.Module, loss: Loss, weight: Tensor, rows: slice) -> Tensor:
    """(new units, weights)."""
    return torch.autograd.grad(loss(network), weight)[0][rows].flatten(1)


# ---------------------------------------------------------------------- what is chosen


def tanh_network(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
    return nn.Sequential(*layers).double()


def tanh_case() -> tuple[nn.Sequential, nn.Sequential, Tensor, Tensor]:
    """Inputs of very different variances, so that the singular values are far apart."""
    torch.manual_seed(16)
    spread = torch.diag(torch.logspace(0.5, -5, 12, dtype=torch.float64))
    inputs = torch.randn(64, 12, dtype=torch.float64) @ spread @ torch.linalg.qr(torch.randn(12, 12).double())[0]
    targets = torch.randn(64, 3, dtype=torch.float64)
    return tanh_network(5), tanh_network(8, 1), inputs, targets


def test_the_outgoing_weights_are_the_first_singular_vectors() -> None:
    small, wide, inputs, targets = tanh_case()

    def loss(network: nn.Module) -> Tensor:
        return F.mse_loss(network(inputs), targets)

    fusion = widened(small, wide, inputs, loss)
    assert fusion.layout.widened == {"0": "gradmax: 3 of 3 units"}
    assert fusion.proof.gap < 1e-14
    heard = small[2](small[1](small[0](inputs))).detach().requires_grad_()
    (delta,) = torch.autograd.grad(F.mse_loss(small[4](small[3](heard)), targets), heard)
    left, values, _ = torch.linalg.svd(delta.T @ inputs)
    assert float((values[1:] / values[:-1]).max()) < 0.3 and float(values[3] / values[2]) < 0.2

    scale = 0.5 * float(small[2].weight.detach().norm(dim=0).mean())
    outgoing = wide[2].weight.detach()[:, 5:] / scale
    torch.testing.assert_close(outgoing.T @ outgoing, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    sines = torch.linalg.svdvals(outgoing - left[:, :3] @ (left[:, :3].T @ outgoing))
    assert float(sines.max()) < 1e-6
    assert not bool(wide[0].weight[5:].any() or wide[0].bias[5:].any())
    gradient = incoming_gradient(wide, loss, wide[0].weight, slice(5, None))
    assert float(gradient.square().sum()) == pytest.approx(float(values[:3].square().sum()) * scale**2, rel=1e-10)
    torch.testing.assert_close(gradient.norm(dim=1) / scale, values[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["tanh", "convolution", "relu", "relu convolution", "gelu"])
def test_no_random_choice_has_a_larger_gradient(kind: str) -> None:
    activation = nn.ReLU if "relu" in kind else nn.GELU if kind == "gelu" else nn.Tanh
    torch.manual_seed(0)
    if "convolution" in kind:
        make = lambda w: nn.Sequential(  # noqa: E731
            nn.Conv2d(2, w, 3), activation(), nn.Conv2d(w, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5)
        )
        inputs = torch.randn(32, 2, 8, 8).double()
    else:
        make = lambda w: nn.Sequential(nn.Linear(10, w), activation(), nn.Linear(w, 8), nn.Tanh(), nn.Linear(8, 5))  # noqa: E731
        inputs = torch.randn(64, 10).double()
    small, wide, loss = make(5).double(), make(9).double(), toward_noise(inputs)
    fusion = widened(small, wide, inputs, loss)
    assert fusion.layout.widened == {"0": "gradmax: 4 of 4 units"}
    weight, rows = wide[0].weight, slice(5, None)
    best = float(incoming_gradient(wide, loss, weight, rows).square().sum())
    chosen = wide[2].weight.detach()[:, 5:].clone()
    norms = chosen.transpose(0, 1).flatten(1).norm(dim=1)
    assert float(norms.std()) < 1e-6 * float(norms.mean())
    others = []
    for _ in range(200):
        frame = torch.linalg.qr(torch.randn(chosen[:, 0].numel(), 4).double())[0].T
        with torch.no_grad():
            wide[2].weight[:, 5:] = (norms[:, None] * frame).view(chosen.transpose(0, 1).shape).transpose(0, 1)
        others.append(float(incoming_gradient(wide, loss, weight, rows).square().sum()))
    assert best > max(others)
    assert best > 1.5 * sum(others) / len(others)


def test_units_beyond_the_rank_are_new_ones() -> None:
    """One output alone can only hear one direction; units with the same would never be more than one."""
    torch.manual_seed(0)
    small, wide = (nn.Sequential(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, 1)).double() for w in (4, 12))
    own, inputs = wide[0].weight.detach()[4:].clone(), torch.randn(32, 8).double()
    fusion = widened(small, wide, inputs)
    assert fusion.layout.widened == {"0": "gradmax: 1 of 8 units"}
    (chosen,) = wide[2].weight[0, 4:].nonzero().flatten().tolist()
    assert not bool(wide[0].weight[4 + chosen].any())
    rest = [unit for unit in range(8) if unit != chosen]
    torch.testing.assert_close(wide[0].weight[4:][rest], own[rest], rtol=0, atol=0)


def test_one_map_of_several_pixels_is_one_unit() -> None:
    torch.manual_seed(0)
    small, wide = (
        nn.Sequential(nn.Conv2d(1, w, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(9 * w, 5)).double() for w in (3, 5)
    )
    fusion = widened(small, wide, IMAGES.double())
    assert fusion.layout.widened == {"0": "gradmax: 2 of 2 units"}
    usual = small[3].weight.detach().view(5, 3, 9).square().sum((0, 2)).sqrt().mean()
    found = wide[3].weight.detach()[:, 27:].view(5, 2, 9).square().sum((0, 2)).sqrt()
    torch.testing.assert_close(found, (0.5 * usual).expand(2), rtol=0.02, atol=0)


def test_several_donors_and_units_beyond_them() -> None:
    torch.manual_seed(0)
    a, b, wide = (nn.Sequential(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, 6)) for w in (4, 5, 12))
    inputs = torch.randn(32, 8)
    fusion = fuse([a, b], wide, inputs, widen="gradmax", loss=toward_noise(inputs))
    assert fusion.proof.promised
    assert fusion.layout.widened == {"0": "gradmax: 3 of 3 units"}


# ---------------------------------------------------------------------- the function


def network(activation: Callable[[], nn.Module], width: int, *middle: nn.Module) -> nn.Module:
    first, second = nn.Sequential(nn.Linear(10, width), *middle), nn.Linear(width, width)
    return nn.Sequential(first, activation(), second, activation(), nn.Linear(width, 6))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.LeakyReLU])
def test_the_function_is_kept_through_activations(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 10)
    fusion = widened(trained(network(activation, 8)), network(activation, 12), inputs)
    assert fusion.proof.promised and fusion.proof.gap <= 2e-6
    assert fusion.layout.widened == {"0.0": "gradmax: 4 of 4 units", "2": "gradmax: 4 of 4 units"}


def test_incoming_weights_are_small_only_where_they_must_not_be_zero() -> None:
    """Torch's ReLU has the derivative 0 at 0."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 10)
    relu, tanh = network(nn.ReLU, 12), network(nn.Tanh, 12)
    widened(network(nn.ReLU, 8), relu, inputs, tolerance=1e-4)
    widened(network(nn.Tanh, 8), tanh, inputs)
    assert not bool(tanh[0][0].weight[8:].any() or tanh[2].weight[8:].any())
    weight = relu[0][0].weight.detach()
    usual = float(weight[:8].norm(dim=1).mean())
    torch.testing.assert_close(weight[8:].norm(dim=1), torch.full((4,), 1e-5 * usual), rtol=1e-4, atol=0)
    assert not bool(relu[0][0].bias[8:].any())


NORMALIZED = "new: its units are normalized, or saturated"


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (nn.BatchNorm1d, NORMALIZED),
        (nn.LayerNorm, "new: its units are heard by a norm over all units, or by a tied weight"),
    ],
)
def test_normalized_units_stay_as_they_are(middle: Callable[[int], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    small, wide = trained(network(nn.Tanh, 8, middle(8))), network(nn.Tanh, 12, middle(12))
    own = wide[0][0].weight.detach()[8:].clone()
    fusion = widened(small, wide, torch.randn(64, 10))
    assert fusion.layout.widened == {"0.0": reason, "2": "gradmax: 4 of 4 units"}
    torch.testing.assert_close(wide[0][0].weight[8:], own, rtol=0, atol=0)
    assert not bool(wide[2].weight[:8, 8:].any())


def test_units_that_cannot_learn_are_not_chosen() -> None:
    torch.manual_seed(0)
    small, wide = trained(network(nn.Tanh, 8)), network(nn.Tanh, 12)
    wide[0].requires_grad_(False)
    own = wide[0][0].weight[8:].clone()
    fusion = widened(small, wide, torch.randn(64, 10))
    assert fusion.layout.widened == {"0.0": "new: its weights are frozen", "2": "gradmax: 4 of 4 units"}
    torch.testing.assert_close(wide[0][0].weight[8:], own, rtol=0, atol=0)
    assert not wide[0][0].weight.requires_grad and wide[2].weight.requires_grad


@pytest.mark.parametrize("activation", [nn.Sigmoid, lambda: nn.Hardshrink(0.5)], ids=["sigmoid", "hardshrink"])
def test_activations_that_do_not_go_through_zero_with_a_slope(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    fusion = widened(network(activation, 8), network(activation, 12), torch.randn(64, 10))
    assert fusion.proof.gap <= 1e-6
    assert all(text.startswith("new: ") for text in fusion.layout.widened.values())


def test_a_convolutional_network_with_batch_norm() -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == "resnet")
    wide = architecture.make(**{**architecture.small, "width": 6}, **architecture.extra)
    fusion = widened(architecture.donor(0), wide, architecture.probe)
    assert fusion.proof.promised and fusion.proof.gap <= 1e-5
    assert fusion.layout.widened["stages.0.conv1"] == NORMALIZED
    assert all(text.startswith("new: ") for text in fusion.layout.widened.values())


GPT2 = {"vocab_size": 50, "n_positions": 16, "n_layer": 2, "n_embd": 16, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
VIT = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_hidden_layers": 2, "hidden_size": 16}
LLAMA = {"vocab_size": 50, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
LLAMA |= {"max_position_embeddings": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("make", "common", "small", "grown", "probe", "chosen"),
    [
        (
            hugging_face("GPT2Config", "GPT2LMHeadModel"),
            GPT2,
            {"n_inner": 24},
            {"n_inner": 40},
            {"input_ids": TOKENS},
            {"transformer.h.0.mlp.c_fc": 15, "transformer.h.1.mlp.c_fc": 15},  # norms take the mean: one direction less
        ),
        (
            hugging_face("ViTConfig", "ViTForImageClassification"),
            {**VIT, "num_attention_heads": 2},
            {"intermediate_size": 32},
            {"intermediate_size": 38},
            {"pixel_values": IMAGES},
            {"vit.layers.0.mlp.fc1": 6, "vit.layers.1.mlp.fc1": 6},
        ),
        (
            hugging_face("LlamaConfig", "LlamaForCausalLM"),
            LLAMA,
            {"intermediate_size": 24},
            {"intermediate_size": 32},
            {"input_ids": TOKENS},
            {"model.layers.0.mlp.up_proj": 8, "model.layers.1.mlp.up_proj": 8},
        ),
        (
            hugging_face("LlamaConfig", "LlamaForCausalLM"),
            LLAMA,
            {"num_attention_heads": 2, "num_key_value_heads": 2},
            {"num_attention_heads": 4, "num_key_value_heads": 4},
            {"input_ids": TOKENS},
            {"model.layers.0.self_attn.v_proj": 16, "model.layers.1.self_attn.v_proj": 16},
        ),
    ],
    ids=["GPT-2", "ViT", "gated", "heads"],
)
def test_the_function_of_transformers_is_kept(
    make: Callable[..., nn.Module],
    common: dict[str, Any],
    small: dict[str, Any],
    grown: dict[str, Any],
    probe: dict[str, Tensor],
    chosen: dict[str, int],
) -> None:
    torch.manual_seed(0)
    donor, wide = trained(make(**{**common, **small})), make(**{**common, **grown})
    fusion = widened(donor, wide, probe)
    assert fusion.proof.promised and fusion.proof.gap <= 1e-5
    found = {name: text for name, text in fusion.layout.widened.items() if text.startswith("gradmax")}
    assert {name: int(text.split()[1]) for name, text in found.items()} == chosen


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_any_architecture_by_width(architecture: Architecture) -> None:
    """What is exact stays so; where new units enter norms over all units the gap is about what it is with random ones."""
    settings = architecture.small
    if architecture.normalized:
        settings = architecture.grown
    elif architecture.name == "LSTM-projected":
        settings = {"width": 9, "proj_size": 6}
    else:
        settings = {**settings, "width": settings["width"] * 3 // 2}
    torch.manual_seed(99)
    wide = architecture.make(**settings, **architecture.extra)
    donor, plain = architecture.donor(0), copy.deepcopy(wide)
    fusion = widened(donor, wide, architecture.probe)
    usual = fuse([donor], plain, architecture.probe, widen="new")
    assert fusion.proof.promised == usual.proof.promised
    assert fusion.proof.gap <= max(1e-5, 1.25 * usual.proof.gap)
    assert architecture.name == "resnet" or any("gradmax" in text for text in fusion.layout.widened.values())
    old = [fusion.op.push([donor.state_dict()], network.state_dict()) for network in (wide, plain)]
    for name, tensor in old[0].items():  # what comes of the donor is the same, and what hears new units is apart
        axes = fusion.layout.tensors[name].axes
        if all(axis is None for axis in axes):
            torch.testing.assert_close(tensor, old[1][name], rtol=0, atol=0)


# ---------------------------------------------------------------------- manners


def test_the_choice_is_the_seed_s_and_leaves_all_else_alone() -> None:
    torch.manual_seed(0)
    small, first, inputs = network(nn.ReLU, 8), network(nn.ReLU, 12), torch.randn(64, 10)
    first[0][0].bias.requires_grad_(False)
    again, other, plain, before = (copy.deepcopy(net) for net in (first, first, first, small))
    state = torch.get_rng_state()
    for net, seed in ((first, 1), (again, 1), (other, 2)):
        widened(small, net, inputs, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    fuse([small], plain, inputs, widen="new")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first[2].weight, other[2].weight)
    torch.testing.assert_close(first[2].weight[:8, :8], plain[2].weight[:8, :8], rtol=0, atol=0)
    assert [p.requires_grad for p in first.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert all(p.grad is None for p in first.parameters()) and first.training
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name])


def test_what_a_network_keeps_from_call_to_call_is_in_no_other_gradient() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.hidden = nn.RNNCell(3, 4), None

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self.cell(x, self.hidden)
            return self.hidden

    torch.manual_seed(0)
    network, inputs = Recurrent(), torch.randn(8, 3)
    meter = Meter(network, lambda net: net(inputs).square().sum(), ["cell.weight_ih"])
    first, again = meter.gradient(meter.start), meter.gradient(meter.start)
    assert torch.equal(first["cell.weight_ih"], again["cell.weight_ih"]) and network.hidden is None


def test_gradients_of_processes_are_averaged() -> None:
    """Two of them, each with half of the data, choose as one with all."""
    torch.manual_seed(0)
    small, together, inputs, targets = tanh_case()
    alone = copy.deepcopy(together)
    widened(small, together, inputs, lambda net: F.mse_loss(net(inputs), targets))

    class Half:
        """The loss of one half, and what the other process would give: as the parameters are when it is asked."""

        def __call__(self, net: nn.Module) -> Tensor:
            self.network = net
            return F.mse_loss(net(inputs[:32]), targets[:32])

        def mean(self, flat: Tensor) -> Tensor:
            held = [p for p in self.network.parameters() if p.requires_grad]
            other = torch.autograd.grad(F.mse_loss(self.network(inputs[32:]), targets[32:]), held)
            return (flat + torch.cat([g.flatten() for g in other])) / 2

    half = Half()
    fuse([small], alone, inputs, widen="gradmax", loss=half, mean=half.mean)
    torch.testing.assert_close(alone[2].weight, together[2].weight, rtol=0, atol=1e-7)


def test_the_plan_tells_what_was_chosen() -> None:
    torch.manual_seed(0)
    small, wide = network(nn.Tanh, 8, nn.BatchNorm1d(8)), network(nn.Tanh, 12, nn.BatchNorm1d(12))
    table = widened(small, wide, torch.randn(64, 10)).layout.table()
    notes = dict(zip(table.columns[0]._cells, table.columns[-1]._cells, strict=True))
    assert notes["0.0.weight"] == NORMALIZED and notes["2.weight"] == "gradmax: 4 of 4 units"
    assert notes["4.weight"] == notes["2.bias"] == ""


def test_errors() -> None:
    torch.manual_seed(0)
    small, wide, inputs = network(nn.Tanh, 8), network(nn.Tanh, 12), torch.randn(64, 10)
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(ValueError, match="chooses new units by a gradient: give loss="):
        fuse([small], wide, inputs, widen="gradmax")
    for loss in (lambda net: net(inputs), lambda net: net(inputs).detach().mean(), lambda net: 1.0):
        with pytest.raises(ValueError, match="must be a scalar with a graph"):
            widened(small, wide, inputs, loss)
    with pytest.raises(FusionError, match="is not finite"):
        widened(small, wide, inputs, lambda net: net(inputs).mean() * float("nan"))
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_without_new_units_there_is_nothing_to_choose() -> None:
    torch.manual_seed(0)
    small, wide, inputs = network(nn.Tanh, 8), network(nn.Tanh, 16), torch.randn(64, 10)
    fusion = fuse([small, small], wide, inputs, widen="gradmax", loss=toward_noise(inputs))
    assert fusion.layout.widened == {}


# ---------------------------------------------------------------------- what it brings


@pytest.mark.parametrize(("outputs", "chosen", "factor"), [(1, 1, 1.1), (8, 8, 2.0)])
def test_the_first_steps_are_faster_on_the_toy(outputs: int, chosen: int, factor: float) -> None:
    """Students of 4 units that have come to a halt grow to 12 and take 20 steps, ten seeds."""
    inputs, gains = data()[0], []
    torch.manual_seed(0)
    teacher = students(12, outputs)
    with torch.no_grad():
        teacher[0].weight.mul_(3)
        teacher[2].weight.mul_(2)
        batch = inputs, teacher(inputs)
    for seed in range(1, 11):
        torch.manual_seed(seed)
        small, grown, decrease = students(4, outputs), students(12, outputs), []
        before = descend(small, batch, 2000)
        for widen in ("new", "gradmax"):
            wide = copy.deepcopy(grown)
            fusion = fuse([small], wide, inputs, widen=widen, loss=lambda net: mean_square(net, batch))
            decrease.append(before - descend(wide, batch, 20))
        assert fusion.layout.widened == {"0": f"gradmax: {chosen} of 8 units"}
        gains.append(decrease[1] / decrease[0])
    assert sum(gain > 1 for gain in gains) >= 9
    assert sum(gains) / len(gains) > factor, gains


def students(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def descend(network: nn.Module, batch: tuple[Tensor, Tensor], steps: int) -> float:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        mean_square(network, batch).backward()
        optimizer.step()
    return float(mean_square(network, batch).detach())
