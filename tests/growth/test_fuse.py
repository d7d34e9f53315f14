"""A fused network computes the average of its donors: measured against the donors themselves."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sop.growth import FusionError, fuse
from lightning_sop.growth.norms import group_like_, group_norms_
from lightning_sop.zoo.nets import Decoder, ResidualBlock, ViT
from tests.growth.architectures import (
    ARCHITECTURES,
    IMAGES,
    NORMALIZED,
    PLAIN,
    TOKENS,
    TRANSFORMERS,
    Architecture,
    Branches,
    hugging_face,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # torch's own
every = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
plain = pytest.mark.parametrize("architecture", PLAIN, ids=lambda a: a.name)
normalized = pytest.mark.parametrize("architecture", NORMALIZED + TRANSFORMERS, ids=lambda a: a.name)


def outputs(net: nn.Module, probe: Any) -> Tensor:
    net.eval()
    with torch.no_grad():
        answer = net(**probe) if isinstance(probe, Mapping) else net(probe)
    return answer if isinstance(answer, Tensor) else answer.logits


def other_inputs(probe: Any) -> Any:
    """Not those on which the fusion was probed."""
    generator = torch.Generator().manual_seed(5)
    if isinstance(probe, Mapping):
        return {name: other_inputs(value) for name, value in probe.items()}
    if probe.is_floating_point():
        return torch.randn(probe.shape, generator=generator)
    return torch.randint(0, 50, probe.shape, generator=generator)


def gap(donors: list[nn.Module], weights: tuple[float, ...], wide: nn.Module, probe: Any) -> float:
    average = sum(w * outputs(donor, probe) for w, donor in zip(weights, donors, strict=True))
    return float((outputs(wide, probe) - average).abs().max() / average.abs().max())


@every
def test_self_fusion_keeps_the_function(architecture: Architecture) -> None:
    donor, wide = architecture.donor(0), architecture.wide()
    fusion = fuse([donor, donor], wide, architecture.probe)
    assert fusion.layout.weights == (0.3, 0.7)
    assert fusion.proof.promised
    assert fusion.proof.gap <= 1e-5
    assert gap([donor, donor], fusion.layout.weights, wide, other_inputs(architecture.probe)) <= 1e-5


@plain
def test_different_donors_are_averaged(architecture: Architecture) -> None:
    donors, wide = [architecture.donor(0), architecture.donor(1)], architecture.wide()
    fusion = fuse(donors, wide, architecture.probe)
    assert fusion.layout.weights == (0.5, 0.5)
    assert fusion.proof.promised
    assert gap(donors, (0.5, 0.5), wide, other_inputs(architecture.probe)) <= 1e-5


@normalized
def test_norms_over_different_donors_leave_a_gap_that_is_measured(architecture: Architecture) -> None:
    donors, wide = [architecture.donor(0), architecture.donor(1)], architecture.wide()
    fusion = fuse(donors, wide, architecture.probe)
    assert not fusion.proof.promised
    assert fusion.proof.inexact
    assert fusion.proof.gap > 1e-3
    assert fusion.proof.inexact[0] in str(fusion.proof)


@normalized
def test_grouped_norms_are_exact_for_different_donors(architecture: Architecture) -> None:
    donors, wide = [architecture.donor(0), architecture.donor(1)], architecture.wide()
    names = set(wide.state_dict())
    fusion = fuse(donors, wide, architecture.probe, norm="grouped")
    assert fusion.proof.promised
    assert gap(donors, (0.5, 0.5), wide, other_inputs(architecture.probe)) <= 1e-5
    added = set(wide.state_dict()) - names
    assert added
    assert all(name.endswith(".groups") for name in added)
    assert not any(getattr(m, "activation_relu_or_gelu", 0) for m in wide.modules())  # torch's one-call encoder layers
    for rebuilt in (copy.deepcopy(wide), pickle.loads(pickle.dumps(wide)), architecture.wide()):
        with contextlib.suppress(RuntimeError):
            rebuilt.load_state_dict(wide.state_dict())
        group_like_(rebuilt, wide.state_dict())
        rebuilt.load_state_dict(wide.state_dict())
        torch.testing.assert_close(outputs(rebuilt, architecture.probe), outputs(wide, architecture.probe), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="groups"):  # not taken for the plain architecture by mistake
        architecture.wide().load_state_dict(wide.state_dict())


def test_grouped_norms_train() -> None:
    """Against the formula, values and gradients."""
    torch.manual_seed(0)
    norm, x = nn.Sequential(nn.LayerNorm(10)).double(), torch.randn(3, 4, 10, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        norm[0].weight.normal_()
        norm[0].bias.normal_()
    group_norms_(norm, {"0": [4, 6]})
    parts = [nn.functional.layer_norm(part, part.shape[-1:]) for part in x.split([4, 6], -1)]
    expected = torch.cat(parts, -1) * norm[0].weight + norm[0].bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    leaves = [x, norm[0].weight, norm[0].bias]
    for ours, theirs in zip(
        torch.autograd.grad(norm(x).pow(3).sum(), leaves), torch.autograd.grad(expected.pow(3).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_failed_fusion_leaves_no_grouped_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = next(a for a in NORMALIZED if a.name == "decoder")
    wide = architecture.wide()
    before = outputs(wide, TOKENS)

    def refuse(*_: Any, **__: Any) -> None:
        raise FusionError("planted")

    monkeypatch.setattr(sys.modules["lightning_sop.growth.fuse"], "prove", refuse)  # the package's attribute is the function
    with pytest.raises(FusionError, match="planted"):
        fuse([architecture.donor(0), architecture.donor(1)], wide, TOKENS, norm="grouped")
    assert not any(type(module).__name__.startswith("Grouped") for module in wide.modules())
    assert all(layer.activation_relu_or_gelu == 2 for layer in wide.layers)
    torch.testing.assert_close(outputs(wide, TOKENS), before, rtol=0, atol=0)


def test_norms_that_cannot_be_grouped() -> None:
    with pytest.raises(FusionError, match=r"0: BatchNorm1d cannot be split"):
        group_norms_(nn.Sequential(nn.BatchNorm1d(4)), {"0": [2, 2]})
    with pytest.raises(FusionError, match=r"0: LayerNorm cannot be split into groups of \(2, 3\)"):
        group_norms_(nn.Sequential(nn.LayerNorm(4)), {"0": [2, 3]})


@every
def test_the_fused_network_is_an_ordinary_one(architecture: Architecture) -> None:
    donor, wide = architecture.donor(0), architecture.wide()
    fuse([donor, donor], wide, architecture.probe)
    fresh = architecture.wide()
    fresh.load_state_dict(wide.state_dict())
    torch.testing.assert_close(outputs(fresh, architecture.probe), outputs(wide, architecture.probe), rtol=0, atol=0)


@every
def test_donors_and_random_state_are_left_alone(architecture: Architecture) -> None:
    donor, wide = architecture.donor(0), architecture.wide()
    before = copy.deepcopy(donor.state_dict())
    state = torch.get_rng_state()
    fuse([donor, donor], wide, architecture.probe)
    assert torch.equal(state, torch.get_rng_state())
    assert wide.training
    for name, tensor in donor.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@every
def test_pulled_back_gradient_is_the_donors(architecture: Architecture) -> None:
    """The chain rule, Gᵀ∇L(Gθ) = ∇L(θ), and the energy of the image part."""
    donor, wide = architecture.donor(0).double(), architecture.wide().double()
    fusion = fuse([donor, donor], wide, architecture.probe)
    gradients = []
    for net in (donor, wide):
        net.eval()
        probe = architecture.probe
        if isinstance(probe, Mapping):
            answer = net(**{k: v.double() if v.is_floating_point() else v for k, v in probe.items()}).logits
        else:
            answer = net(probe.double() if probe.is_floating_point() else probe)
        (answer - 1).square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    small = dict(donor.named_parameters())
    (pulled,) = fusion.op.pull(gradients[1], [small])
    # models of transformers compute norms and rotations in float32, whatever the weights are
    tolerance = 1e-10 if architecture not in TRANSFORMERS else 1e-5
    for name, gradient in gradients[0].items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(pulled[name], gradient, rtol=0, atol=tolerance * scale, msg=name)


@settings(max_examples=15, deadline=None)
@given(widths=st.lists(st.integers(1, 6), min_size=2, max_size=8), seed=st.integers(0, 1000))
def test_any_number_of_donors_of_any_widths(widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)

    def make(width: int) -> nn.Module:
        convolutions = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2 * width * 16, 3))

    donors = [trained(make(width)) for width in widths]
    weights = torch.rand(len(widths), dtype=torch.float64) + 0.1
    wide, shares = make(sum(widths)), tuple((weights / weights.sum()).tolist())
    fusion = fuse(donors, wide, IMAGES, weights=shares)
    assert fusion.proof.promised
    assert gap(donors, shares, wide, other_inputs(IMAGES)) <= 1e-5


def test_three_copies_and_another_network() -> None:
    a, b = (trained(Branches(4)) for _ in range(2))
    wide = Branches(12)
    fusion = fuse([a, a, b], wide, IMAGES)
    assert fusion.op.sources == (0, 0, 1)
    assert fusion.layout.weights == pytest.approx((0.2, 1.4 / 3, 1 / 3))
    assert gap([a, a, b], fusion.layout.weights, wide, other_inputs(IMAGES)) <= 1e-5


def test_noise_between_donors_is_of_the_asked_size_and_measured() -> None:
    torch.manual_seed(0)
    donor = trained(nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2)))
    wide = nn.Sequential(nn.Linear(8, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 2))
    fusion = fuse([donor, donor], wide, torch.randn(9, 8), off_diagonal=0.01)
    weight = wide[2].weight.detach()
    between = torch.cat([weight[:40, 40:], weight[40:, :40]])
    assert float(between.std() / donor[2].weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not fusion.proof.promised
    assert 0 < fusion.proof.gap < 0.1


def test_equal_donors_between_them_zeros() -> None:
    donor = trained(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    wide = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    fuse([donor, donor], wide, torch.randn(9, 8), weights=[0.5, 0.5])
    expected = torch.block_diag(donor[2].weight, donor[2].weight)
    torch.testing.assert_close(wide[2].weight, expected, rtol=0, atol=0)
    torch.testing.assert_close(wide[4].weight, 0.5 * torch.cat([donor[4].weight, donor[4].weight], 1), rtol=0, atol=0)


def test_the_plan_can_be_read() -> None:
    donor = trained(Decoder(50, 16, depth=1, width=16, heads=2))
    fusion = fuse([donor, donor], Decoder(50, 16, depth=1, width=32, heads=4), TOKENS)
    rules = {name: tensor.describe() for name, tensor in fusion.layout.tensors.items()}
    assert rules["layers.0.self_attn.in_proj_weight"] == "axis 0: 48|48 in 3 chunks; axis 1: 16|16 summed"
    assert rules["embedding.weight"] == "axis 1: 16|16"
    assert fusion.layout.tensors["embedding.weight"].names == ("embedding.weight", "head.weight")
    assert fusion.layout.table().row_count == len(fusion.layout.tensors)


# ---------------------------------------------------------------------- one network and new units


@plain
@pytest.mark.parametrize("widen", ["new", "copy"])
def test_new_units_keep_the_function(architecture: Architecture, widen: str) -> None:
    """New units that nothing listens to yet, or Net2Net's copies whose outgoing weights are divided among them."""
    if architecture.name == "LSTM-projected":
        wide = architecture.make(width=9, proj_size=6, **architecture.extra)
    else:
        wide = architecture.make(
            **{**architecture.small, "width": architecture.small["width"] * 3 // 2}, **architecture.extra
        )
    donor = architecture.donor(0)
    fusion = fuse([donor], wide, architecture.probe, widen=widen)
    assert fusion.proof.promised
    assert gap([donor], (1.0,), wide, other_inputs(architecture.probe)) <= 1e-5


@normalized
def test_whole_copies_keep_the_function_through_norms(architecture: Architecture) -> None:
    donor, wide = architecture.donor(0), architecture.wide()
    fusion = fuse([donor], wide, architecture.probe, widen="copy")
    assert fusion.layout.weights == (1.0,)
    assert gap([donor], (1.0,), wide, other_inputs(architecture.probe)) <= 1e-5


def test_new_units_must_be_asked_for() -> None:
    donor, wide = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2))
    with pytest.raises(FusionError, match=r"0\.weight.* has 6 units in the donors and 9 in the grown model"):
        fuse([donor], wide, torch.randn(3, 4))


def test_new_units_feed_from_their_own_weights_and_are_not_heard() -> None:
    donor = trained(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    wide = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    own = wide[0].weight.detach()[6:].clone()
    fuse([donor], wide, torch.randn(9, 4), widen="new")
    torch.testing.assert_close(wide[0].weight[6:], own, rtol=0, atol=0)
    assert not bool(wide[2].weight[:, 6:].any())


# ---------------------------------------------------------------------- depth

BLOCK = {"n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
DEEPER = [
    ("decoder", lambda n: Decoder(50, 16, width=16, heads=2, depth=n), TOKENS, ["self_attn.out_proj", "linear2"]),
    ("vit", lambda n: ViT((1, 8, 8), 10, width=16, heads=2, depth=n), IMAGES, ["self_attn.out_proj", "linear2"]),
    (
        "GPT-2",
        lambda n: hugging_face("GPT2Config", "GPT2LMHeadModel")(n_layer=n, **BLOCK),
        {"input_ids": TOKENS},
        ["attn.c_proj", "mlp.c_proj"],
    ),
    (
        "residual",
        lambda n: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Sequential(*(ResidualBlock(4, 4, stride=1) for _ in range(n))), nn.Flatten()
        ),
        IMAGES,
        ["norm2"],
    ),
]


@pytest.mark.parametrize(("make", "probe", "zeroed"), [d[1:] for d in DEEPER], ids=[d[0] for d in DEEPER])
def test_new_blocks_start_as_the_identity(make: Any, probe: Any, zeroed: list[str]) -> None:
    donor, deeper = trained(make(1)), make(3)
    fusion = fuse([donor], deeper, probe)
    assert fusion.proof.promised
    torch.testing.assert_close(outputs(deeper, other_inputs(probe)), outputs(donor, other_inputs(probe)))
    # only what ends the branches is zero, so that it has a gradient
    new = [name for name, p in deeper.named_parameters() if name not in dict(donor.named_parameters())]
    weights = [n for n in new if n.endswith("weight") and not bool(deeper.get_parameter(n).any())]
    assert weights == [n for n in new if n.removesuffix(".weight").endswith(tuple(zeroed)) and n.endswith("weight")]
    deeper.train()
    answer = deeper(**probe).logits if isinstance(probe, Mapping) else deeper(probe)
    answer.pow(2).sum().backward()
    assert all(bool(deeper.get_parameter(name).grad.any()) for name in weights)


def test_width_and_depth_at_once() -> None:
    donor = trained(Decoder(50, 16, width=16, heads=2, depth=1))
    wide = Decoder(50, 16, width=32, heads=4, depth=2)
    fusion = fuse([donor, donor], wide, TOKENS)
    assert gap([donor, donor], fusion.layout.weights, wide, other_inputs(TOKENS)) <= 1e-5


def test_blocks_that_cannot_be_the_identity() -> None:
    post_norm = hugging_face("BertConfig", "BertForMaskedLM")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    with pytest.raises(FusionError, match=r"bert\.encoder\.layer\.1: the new block cannot start as the identity"):
        fuse([post_norm(num_hidden_layers=1, **sizes)], post_norm(num_hidden_layers=2, **sizes), {"input_ids": TOKENS})
    with pytest.raises(FusionError, match="2: the new block cannot start as the identity"):
        fuse(
            [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))],
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))),
            torch.randn(3, 4),
        )


# ---------------------------------------------------------------------- refusals


def test_heads_that_do_not_grow() -> None:
    donor = Decoder(50, 16, depth=1, width=16, heads=2)
    with pytest.raises(FusionError, match=r"layers\.0\.self_attn .* number of heads must grow"):
        fuse([donor, donor], Decoder(50, 16, depth=1, width=32, heads=2), TOKENS)


def test_widths_that_do_not_add_up_name_the_parameter_and_leave_the_model_alone() -> None:
    donor, wide = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), nn.Sequential(nn.Linear(4, 13), nn.Linear(13, 2))
    before = copy.deepcopy(wide.state_dict())
    with pytest.raises(FusionError, match=r"0\.weight.* 6 \+ 6 .* 13 .* expected 12"):
        fuse([donor, donor], wide, torch.randn(3, 4))
    assert all(torch.equal(wide.state_dict()[name], tensor) for name, tensor in before.items())


def test_another_architecture() -> None:
    donor, wide = (
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)),
        nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2)),
    )
    with pytest.raises(FusionError, match=r"donor 1: 1\.bias, of shape \(2,\), is in the donor but not in the grown model"):
        fuse([donor, donor], wide, torch.randn(3, 4))


def test_vocabularies_that_differ() -> None:
    donors = [Decoder(50, 16, depth=1, width=16, heads=2), Decoder(40, 16, depth=1, width=16, heads=2)]
    with pytest.raises(FusionError, match=r"embedding\.weight: an axis that does not grow has 50 .* \[50, 40\]"):
        fuse(donors, Decoder(50, 16, depth=1, width=32, heads=4), TOKENS % 40)


@pytest.mark.parametrize("weights", [[0.5], [0.5, 0.6], [1.0, 0.0], [float("nan"), 0.5]])
def test_wrong_weights(weights: list[float]) -> None:
    donor = nn.Linear(4, 2)
    with pytest.raises(FusionError, match="weights must be 2 numbers other than 0 that sum to 1"):
        fuse([donor, donor], nn.Linear(4, 2), torch.randn(3, 4), weights=weights)


def test_number_of_donors() -> None:
    with pytest.raises(FusionError, match="1 to 8 donors, not 9"):
        fuse([nn.Linear(4, 2)] * 9, nn.Linear(4, 2), torch.randn(3, 4))


def test_positions_computed_from_the_width() -> None:
    """Lightning's demo computes sinusoids and a scale of the embedding from the width, outside of its state_dict."""
    from lightning.pytorch.demos import Transformer

    donor = Transformer(vocab_size=50, ninp=16, nhead=2, nhid=16)
    with pytest.raises(FusionError, match="computes from its width"):
        fuse([donor, donor], Transformer(vocab_size=50, ninp=32, nhead=4, nhid=32), (TOKENS, TOKENS))


def test_parts_can_be_named() -> None:
    donor = next(a for a in NORMALIZED if a.name == "hand-made-0")
    net, wide = donor.donor(0), donor.wide()
    fusion = fuse([net, net], wide, TOKENS, chunks={"attentions.*.qkv": 3})
    assert fusion.layout.tensors["attentions.1.qkv.bias"].describe() == "axis 0: 48|48 in 3 chunks"
    with pytest.raises(FusionError, match="no layer matches 'nothing'"):
        fuse([net, net], wide, TOKENS, chunks={"nothing": 3})


class TiedByHand(nn.Module):
    """Uses a layer's weight once more, transposed and outside of it."""

    def __init__(self, width: int, head: bool) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(6, width), nn.Linear(6, 3) if head else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(nn.functional.linear(torch.tanh(self.encoder(inputs)), self.encoder.weight.t()))


@pytest.mark.parametrize("head", [True, False])
def test_a_weight_that_is_used_outside_of_its_layer_is_told(head: bool) -> None:
    where = "the first layer that differs is head, and what reaches it" if head else "no layer differs, but what"
    donor = TiedByHand(4, head)
    with pytest.raises(FusionError, match=f"{where} .*outside of its own layer.* with a weight of its own there"):
        fuse([donor, donor], TiedByHand(8, head), torch.randn(16, 6))
