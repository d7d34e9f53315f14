"""Networks to fuse: a small and a grown form of each, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sop.zoo.nets import Decoder, ResNet, ViT

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Architecture:
    name: str
    make: Callable[..., nn.Module]
    small: dict[str, Any]
    grown: dict[str, Any]
    probe: Any
    normalized: bool = False  # a norm runs over the whole width: different donors are not averaged exactly
    extra: dict[str, Any] = field(default_factory=dict)

    def donor(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return trained(self.make(**self.small, **self.extra))

    def wide(self) -> nn.Module:
        torch.manual_seed(99)
        return self.make(**self.grown, **self.extra)


def trained(net: nn.Module) -> nn.Module:
    """As if trained: no zero biases, no unit gains, running statistics that have run."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return net


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3)
    )


class Attention(nn.Module):
    """q, k and v in one matrix, one after the other or head by head."""

    def __init__(self, width: int, heads: int, by_head: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.by_head = heads, by_head

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (self.heads, 3, -1) if self.by_head else (3, self.heads, -1)
        parts = self.qkv(x).view(batch, length, *shape)
        q, k, v = (parts.permute(3, 0, 2, 1, 4) if self.by_head else parts.permute(2, 0, 3, 1, 4)).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class GatedFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Rescale(nn.Module):
    """A norm that does not say so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain


class HandMade(nn.Module):
    """A language model with everything that shapes do not tell."""

    def __init__(self, width: int, heads: int, by_head: bool = False, scaled: bool = False, norm: str = "LayerNorm") -> None:
        super().__init__()
        make_norm = Rescale if norm == "Rescale" else nn.LayerNorm
        self.embedding = nn.Embedding(50, width)
        self.positions = nn.Parameter(torch.randn(1, 12, width))
        self.scale = width**0.5 if scaled else 1.0
        self.norms = nn.ModuleList(make_norm(width) for _ in range(2))
        self.attentions = nn.ModuleList(Attention(width, heads, by_head) for _ in range(2))
        self.feed_forwards = nn.ModuleList(GatedFeedForward(width) for _ in range(2))
        self.norm, self.head = make_norm(width), nn.Linear(width, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.scale + self.positions
        for norm, attention, feed_forward in zip(self.norms, self.attentions, self.feed_forwards, strict=True):
            x = x + attention(norm(x))
            x = x + feed_forward(x)
        return self.head(self.norm(x))


class Matrix(nn.Module):
    """A linear layer of its own kind, inputs first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.shift


class Loose(nn.Module):
    """Matrices that the module uses itself, beside a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(5, width)), nn.Parameter(torch.randn(width, width))
        self.third, self.layer = nn.Parameter(torch.randn(width, 3)), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(F.relu(x @ self.first) @ self.second)) @ self.third


class Recurrent(nn.Module):
    def __init__(self, width: int, kind: str, proj_size: int = 0) -> None:
        super().__init__()
        more = {"proj_size": proj_size} if proj_size else {}
        self.rnn = getattr(nn, kind)(7, width, num_layers=2, batch_first=True, bidirectional=True, **more)
        self.head = nn.Linear(2 * (proj_size or width), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Branches(nn.Module):
    """Concatenated maps, grouped and depthwise convolutions, a transposed one, features flattened position by position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(width // 2, width)
        self.b = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.grouped = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=width // 2)
        self.up, self.mix = nn.ConvTranspose2d(2 * width, width, 2, 2), nn.Conv2d(2 * width, width, 1)
        self.last = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.batch_norm, self.head = nn.BatchNorm2d(3 * width), nn.Linear(3 * width * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm(self.a(x)))
        up = self.up(F.relu(self.grouped(self.depthwise(self.b(a)))))
        mixed = F.relu(self.mix(torch.cat([up, a], 1)))
        maps = self.batch_norm(self.last(torch.cat([a, mixed, up], 1)))
        return self.head(F.max_pool2d(maps, 2).permute(0, 2, 3, 1).flatten(1))


class TwoInputs(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, width), nn.Linear(5, width)
        self.both, self.slope, self.head = nn.Bilinear(width, width, width), nn.PReLU(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.slope(self.both(self.a(x), self.b(x))))


class Translator(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.transformer = nn.Transformer(width, heads, 2, 2, 2 * width, batch_first=True)
        self.head = nn.Linear(width, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.transformer(self.embedding(tokens), self.embedding(tokens[:, :5])))


def hugging_face(config: str, model: str) -> Callable[..., nn.Module]:
    def make(**settings: Any) -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return make


def _heads(width: int, heads: int) -> tuple[dict[str, int], dict[str, int]]:
    return {"width": width, "heads": heads}, {"width": 2 * width, "heads": 2 * heads}


_VECTORS = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
_SEQUENCES = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1))

PLAIN = [
    Architecture("mlp", mlp, {"width": 16}, {"width": 32}, torch.randn(20, 10)),
    Architecture(
        "resnet",
        ResNet,
        {"width": 4},
        {"width": 8},
        IMAGES,
        extra={"image_shape": (1, 8, 8), "num_classes": 10, "blocks": 1},
    ),
    Architecture("branches", Branches, {"width": 4}, {"width": 8}, IMAGES),
    Architecture("bilinear", TwoInputs, {"width": 4}, {"width": 8}, _VECTORS),
    Architecture(
        "matrices",
        lambda width: nn.Sequential(Matrix(5, width), nn.ReLU(), Matrix(width, width), nn.Tanh(), Matrix(width, 3)),
        {"width": 6},
        {"width": 12},
        _VECTORS,
    ),
    Architecture("loose", Loose, {"width": 6}, {"width": 12}, _VECTORS),
    *(
        Architecture(kind, Recurrent, {"width": 6}, {"width": 12}, _SEQUENCES, extra={"kind": kind})
        for kind in ("LSTM", "GRU", "RNN")
    ),
    Architecture(
        "LSTM-projected",
        Recurrent,
        {"width": 6, "proj_size": 4},
        {"width": 12, "proj_size": 8},
        _SEQUENCES,
        extra={"kind": "LSTM"},
    ),
]
NORMALIZED = [
    Architecture("vit", ViT, *_heads(16, 2), IMAGES, True, {"image_shape": (1, 8, 8), "num_classes": 10}),
    Architecture("decoder", Decoder, *_heads(16, 2), TOKENS, True, {"vocabulary": 50, "context": 16, "depth": 2}),
    Architecture(
        "decoder-untied", Decoder, *_heads(16, 2), TOKENS, True, {"vocabulary": 50, "context": 16, "depth": 2, "tied": False}
    ),
    Architecture("nn.Transformer", Translator, *_heads(16, 2), TOKENS, True),
    *(
        Architecture(f"hand-made-{n}", HandMade, *_heads(16, 2), TOKENS, True, extra)
        for n, extra in enumerate(
            [{}, {"by_head": True}, {"scaled": True}, {"by_head": True, "scaled": True}, {"norm": "Rescale"}]
        )
    ),
]
_TEXT = {
    "vocab_size": 50,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BLOCK = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
_BLOCKS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_T5 = {"vocab_size": 50, "num_layers": 2, "d_kv": 8, "decoder_start_token_id": 0}
TRANSFORMERS = [
    Architecture(
        "GPT-2",
        hugging_face("GPT2Config", "GPT2LMHeadModel"),
        {"n_embd": 16, "n_head": 2},
        {"n_embd": 32, "n_head": 4},
        {"input_ids": TOKENS},
        True,
        {"vocab_size": 50, "n_positions": 16, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Architecture(
        "Llama",
        hugging_face("LlamaConfig", "LlamaForCausalLM"),
        {**_BLOCK, "num_attention_heads": 4, "num_key_value_heads": 2},
        {**_BLOCKS, "num_attention_heads": 8, "num_key_value_heads": 4},
        {"input_ids": TOKENS},
        True,
        _TEXT,
    ),
    Architecture("BERT", hugging_face("BertConfig", "BertForMaskedLM"), _BLOCK, _BLOCKS, {"input_ids": TOKENS}, True, _TEXT),
    Architecture(
        "ViT",
        hugging_face("ViTConfig", "ViTForImageClassification"),
        _BLOCK,
        _BLOCKS,
        {"pixel_values": IMAGES},
        True,
        {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_hidden_layers": 2},
    ),
    *(
        Architecture(
            f"T5-{'tied' if tied else 'untied'}",
            hugging_face("T5Config", "T5ForConditionalGeneration"),
            {"d_model": 16, "d_ff": 32, "num_heads": 2},
            {"d_model": 32, "d_ff": 64, "num_heads": 4},
            {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :7]},
            True,
            {**_T5, "tie_word_embeddings": tied},
        )
        for tied in (True, False)
    ),
]
ARCHITECTURES = PLAIN + NORMALIZED + TRANSFORMERS
