"""Small networks in plain torch: a perceptron, a residual network and a vision transformer for images, and a decoder.

Those for images map a float batch (batch, channels, height, width) to logits (batch, num_classes). The last layer of
every network is called ``head``.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ImageShape = tuple[int, int, int]
"""Channels, height and width, in pixels."""


class MLP(nn.Module):
    """Perceptron with ReLU and dropout between its layers.

    Args:
        image_shape: channels, height, width.
        num_classes: number of logits.
        width: units of each hidden layer.
        depth: number of hidden layers; 0 is a linear classifier.
        dropout: probability with which a hidden unit is zeroed while training.
    """

    def __init__(
        self, image_shape: ImageShape, num_classes: int, *, width: int = 128, depth: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        channels, height, image_width = image_shape
        sizes = [channels * height * image_width] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        units = images.flatten(1)
        for layer in self.hidden:
            units = self.dropout(F.relu(layer(units)))
        logits: Tensor = self.head(units)
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut, the basic block of He et al. (2016).

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: stride of the first convolution and of the shortcut.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, maps: Tensor) -> Tensor:
        residual = F.relu(self.norm1(self.conv1(maps)))
        residual = self.norm2(self.conv2(residual))
        return F.relu(residual + self.shortcut(maps))


class ResNet(nn.Module):
    """Residual network in the CIFAR layout: a 3x3 stem, three stages that halve the image, mean pooling.

    Args:
        image_shape: channels, height, width.
        num_classes: number of logits.
        width: channels of the first stage; the later ones have twice and four times as many.
        blocks: residual blocks per stage; the network has 6 * blocks + 2 layers with weights on its main path.
    """

    def __init__(self, image_shape: ImageShape, num_classes: int, *, width: int = 16, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            channels_out = width * 2**stage
            for block in range(blocks):
                stages.append(ResidualBlock(channels, channels_out, stride=2 if stage > 0 and block == 0 else 1))
                channels = channels_out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.stages(self.stem(images))
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021), pre-norm, with a class token and learned positions.

    Args:
        image_shape: channels, height, width; both sides must be multiples of ``patch``.
        num_classes: number of logits.
        patch: side of a patch, in pixels.
        width: features of a token; must be a multiple of ``heads``.
        depth: number of encoder layers.
        heads: attention heads per layer.
        dropout: dropout probability inside the encoder layers.

    Raises:
        ValueError: the image does not divide into patches.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        *,
        patch: int = 2,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels, height, image_width = image_shape
        if height % patch or image_width % patch:
            raise ValueError(f"ViT: images of {height}x{image_width} pixels do not divide into patches of {patch}")
        tokens = (height // patch) * (image_width // patch)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        self.layers = encoder_layers(depth, width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), tokens], dim=1) + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


class Decoder(nn.Module):
    """Decoder-only transformer: logits of the next token at every position.

    Args:
        vocabulary: number of distinct tokens.
        context: longest sequence, in tokens.
        width: features of a token; must be a multiple of ``heads``.
        depth: number of layers.
        heads: attention heads per layer.
        dropout: dropout probability inside the layers.
        tied: whether the head shares the embedding's weight.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        # torch's default of std 1 would make a tied head's first logits of order sqrt(width)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.layers = encoder_layers(depth, width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next token.

        Args:
            tokens: (batch, length) integers, length at most ``context``.

        Returns:
            Logits (batch, length, vocabulary); those at position t depend on tokens 0..t only.

        Raises:
            ValueError: the sequence is longer than ``context``.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"Decoder: a sequence of {length} tokens is longer than the context of {self.context}")
        features = self.embedding(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device, dtype=features.dtype)
        for layer in self.layers:
            features = layer(features, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(features))
        return logits


def encoder_layers(depth: int, width: int, heads: int, dropout: float) -> nn.ModuleList:
    """Pre-norm transformer layers with GELU, each drawn on its own (``nn.TransformerEncoder`` would copy the first)."""
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True)
        for _ in range(depth)
    )
