"""Networks of torch's own layers, and those that Lightning ships."""

from __future__ import annotations

import torch
from lightning.pytorch.demos import Transformer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from tests.conformance.architecture import Architecture, next_token

BIASES = ("*bias*",)


class Unrolled(nn.Module):
    """A recurrent cell over the steps of a sequence."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = self.cell(step, state)
        assert state is not None
        return state[0] if isinstance(state, tuple) else state


class Residual(nn.Module):
    """A block with a shortcut around it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.block(x))


def resnet() -> nn.Module:
    def block() -> nn.Module:
        return Residual(
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
        )

    stem = (nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    return nn.Sequential(*stem, block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def convolutions_2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, padding=2, dilation=2, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(6, 6, (3, 1), groups=6, stride=2, padding=(1, 0), padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(6, 4, 1, padding_mode="replicate", padding=1),
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, output_padding=1, padding=1),
        nn.Tanh(),
        nn.Unflatten(2, (4, 4)),
        nn.ConvTranspose2d(6, 4, (2, 3), dilation=2, groups=2),
        nn.Tanh(),
        nn.Unflatten(1, (2, 2)),
        nn.ConvTranspose3d(2, 3, 2, bias=False),
    )


TORCH = [
    Architecture(
        "lightning_demo_transformer",
        lambda: Transformer(vocab_size=11, ninp=8, nhead=2, nhid=12, nlayers=1),
        lambda: {"inputs": torch.randint(11, (2, 5)), "target": torch.randint(11, (2, 5))},
        plain=(*BIASES, "embedding.weight", "*norm*"),
        share=(3 * 4 * 64 + 2 * 2 * 96 + 88, 3 * 4 * 64 + 2 * 2 * 96 + 88 + 3 * 32 + 2 * 20 + 11 + 88 + 7 * 16),
        loss=next_token,
    ),
    Architecture(
        "lightning_boring_model",
        BoringModel,
        lambda: {"x": torch.randn(4, 32)},
        plain=BIASES,
        share=(64, 66),
    ),
    Architecture(
        "transformer",
        lambda: nn.Transformer(8, 2, 1, 1, 12, activation="gelu", batch_first=True),
        lambda: {"src": torch.randn(2, 4, 8), "tgt": torch.randn(2, 3, 8)},
        plain=(*BIASES, "*norm*"),
        share=(3 * 256 + 2 * 192, 3 * 256 + 2 * 192 + 3 * 32 + 2 * 20 + 7 * 16),
    ),
    Architecture(
        "transformer_encoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2),
        lambda: {"src": torch.randn(2, 5, 8)},
        plain=(*BIASES, "*norm*"),
        share=(2 * (256 + 192), 2 * (256 + 192 + 32 + 20 + 2 * 16)),
    ),
    Architecture(
        "transformer_decoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, bias=False), 2),
        lambda: {"tgt": torch.randn(3, 2, 8), "memory": torch.randn(5, 2, 8)},
        plain=("*norm*",),
        share=(2 * (2 * 256 + 192), 2 * (2 * 256 + 192 + 3 * 8)),
    ),
    Architecture(
        "multihead_attention_kdim_vdim",
        lambda: nn.MultiheadAttention(6, 3, kdim=4, vdim=5, add_bias_kv=True, dropout=0.1),
        lambda: {"query": torch.randn(3, 2, 6), "key": torch.randn(4, 2, 4), "value": torch.randn(4, 2, 5)},
        plain=BIASES,
        share=(6 * (6 + 4 + 5) + 36, 6 * (6 + 4 + 5) + 36 + 18 + 6 + 2 * 6),
    ),
    Architecture(
        "lstm",
        lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=3, dropout=0.1),
        lambda: {"input": torch.randn(5, 2, 4)},
        plain=BIASES,
        share=(2 * 24 * (4 + 3) + 2 * 24 * (6 + 3) + 4 * 18, 2 * 24 * (4 + 3) + 2 * 24 * (6 + 3) + 4 * 18 + 4 * 48),
    ),
    Architecture(
        "gru",
        lambda: nn.GRU(4, 5, num_layers=2),
        lambda: {"input": torch.randn(5, 2, 4)},
        plain=BIASES,
        share=(15 * (4 + 5 + 5 + 5), 15 * (4 + 5 + 5 + 5) + 4 * 15),
    ),
    Architecture(
        "rnn_cell",
        lambda: Unrolled(nn.RNNCell(4, 5)),
        lambda: {"x": torch.randn(4, 2, 4)},
        plain=BIASES,
        share=(20 + 25, 20 + 25 + 10),
    ),
    Architecture(
        "lstm_cell",
        lambda: Unrolled(nn.LSTMCell(4, 5)),
        lambda: {"x": torch.randn(4, 2, 4)},
        plain=BIASES,
        share=(20 * (4 + 5), 20 * (4 + 5) + 40),
    ),
    Architecture(
        "bilinear",
        lambda: nn.Bilinear(3, 4, 5),
        lambda: {"input1": torch.randn(6, 3), "input2": torch.randn(6, 4)},
        plain=BIASES,
        share=(60, 65),
    ),
    Architecture(
        "conv1d",
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, dilation=2), nn.Tanh(), nn.Conv1d(6, 2, 3, padding="same")),
        lambda: {"input": torch.randn(3, 4, 9)},
        plain=BIASES,
        share=(36 + 36, 36 + 36 + 8),
    ),
    Architecture(
        "conv2d_groups_dilation_padding_modes",
        convolutions_2d,
        lambda: {"input": torch.randn(2, 4, 6, 6)},
        plain=BIASES,
        share=(108 + 18 + 24, 108 + 18 + 24 + 16),
    ),
    Architecture(
        "conv3d",
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv3d(4, 2, 2, padding=1, padding_mode="circular")
        ),
        lambda: {"input": torch.randn(2, 2, 3, 4, 3)},
        plain=BIASES,
        share=(32 + 64, 32 + 64 + 6),
    ),
    Architecture(
        "conv_transpose",
        transposed,
        lambda: {"input": torch.randn(2, 4, 8)},
        plain=BIASES,
        share=(36 + 72 + 48, 36 + 72 + 48 + 10),
    ),
    Architecture(
        "batchnorm_resnet",
        resnet,
        lambda: {"input": torch.randn(4, 3, 5, 5)},
        plain=(*BIASES, "1.weight", "*.block.1.weight", "*.block.4.weight"),
        share=(162 + 4 * 324 + 24, 162 + 4 * 324 + 24 + 5 * 12 + 4),
    ),
]
