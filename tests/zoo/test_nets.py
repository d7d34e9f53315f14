"""The networks: shapes, and what their descriptions promise."""

import pytest
import torch
from torch import nn

from lightning_sop.zoo import MLP, Decoder, ResNet, ViT

SHAPE = (3, 8, 12)


@pytest.mark.parametrize("net", [MLP, ResNet, ViT])
def test_images_give_logits_and_every_parameter_gets_a_gradient(net):
    model = net(SHAPE, 7)
    logits = model(torch.randn(5, *SHAPE))
    assert logits.shape == (5, 7)
    logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert isinstance(model.head, nn.Linear)


def test_mlp_equals_its_formula():
    model = MLP((1, 2, 3), 4, width=5, depth=1)
    images = torch.randn(6, 1, 2, 3)
    (first,) = model.hidden
    hidden = (images.reshape(6, 6) @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(model(images), hidden @ model.head.weight.T + model.head.bias)


def test_mlp_without_hidden_layers_is_linear():
    model = MLP((1, 2, 3), 4, depth=0)
    assert [name for name, _ in model.named_parameters()] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(("blocks", "layers"), [(1, 8), (3, 20)])
def test_resnet_depth(blocks, layers):
    kernels = [
        name
        for name, module in ResNet(SHAPE, 10, width=4, blocks=blocks).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(kernels) == layers


def test_resnet_halves_the_image_twice():
    model = ResNet((3, 32, 32), 10, width=4)
    assert model.stages(model.stem(torch.randn(1, 3, 32, 32))).shape == (1, 16, 8, 8)


def test_vit_refuses_images_that_do_not_divide_into_patches():
    with pytest.raises(ValueError, match="8x12 pixels do not divide into patches of 3"):
        ViT(SHAPE, 10, patch=3)


def test_transformer_layers_are_drawn_one_by_one():
    first, second = ViT(SHAPE, 10, depth=2).layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize("training", [True, False])
def test_decoder_sees_no_future(training):
    model = Decoder(11, 6, width=8, depth=2, heads=2).train(training)
    tokens = torch.randint(11, (2, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=(0, 2)).min() > 0


def test_decoder_is_stateless_in_the_length():
    model = Decoder(11, 6, width=8, depth=2, heads=2)
    tokens = torch.randint(11, (2, 6))
    torch.testing.assert_close(model(tokens)[:, :3], model(tokens[:, :3]))


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_head_is_tied_on_request(tied):
    model = Decoder(11, 6, width=8, depth=1, heads=2, tied=tied)
    assert (model.head.weight is model.embedding.weight) == tied


def test_decoder_refuses_a_sequence_longer_than_its_context():
    with pytest.raises(ValueError, match="7 tokens is longer than the context of 6"):
        Decoder(11, 6, width=8, depth=1, heads=2)(torch.zeros(1, 7, dtype=torch.long))
