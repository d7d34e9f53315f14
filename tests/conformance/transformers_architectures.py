"""Networks of the transformers library, from configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

from tests.conformance.architecture import Architecture, Batch, next_token

BIASES_AND_NORMS = ("*.bias", "*norm*.weight", "*LayerNorm.weight", "*ln_?.weight")
DECODER = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "max_position_embeddings": 8}
ENCODER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(*names: str) -> Callable[[], Batch]:
    return lambda: {name: torch.randint(13, (2, 5)) for name in names}


def gpt2() -> nn.Module:
    config = hf.GPT2Config(vocab_size=13, n_positions=6, n_embd=8, n_layer=1, n_head=2, n_inner=12, **TOKENS)
    return hf.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=13, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0, use_cache=False
    )
    return hf.T5ForConditionalGeneration(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, num_attention_heads=4, num_key_value_heads=2))


def mistral() -> nn.Module:
    config = hf.MistralConfig(**DECODER, num_attention_heads=2, num_key_value_heads=1, sliding_window=3)
    return hf.MistralForCausalLM(config)


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**ENCODER, image_size=8, patch_size=4, num_labels=3))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**ENCODER, vocab_size=13, max_position_embeddings=6))


def convnext() -> nn.Module:
    config = hf.ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3)
    return hf.ConvNextForImageClassification(config)


def resnet() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1], layer_type="bottleneck", num_labels=3)
    return hf.ResNetForImageClassification(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=13,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_source_positions=5,
        max_target_positions=6,
        decoder_start_token_id=1,
        use_cache=False,
        **TOKENS,
    )
    return hf.WhisperForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(
        **ENCODER,
        conv_dim=(4, 4),
        conv_stride=(3, 2),
        conv_kernel=(4, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,  # it would be drawn from numpy's global generator
    )
    return hf.Wav2Vec2Model(config)


def mamba() -> nn.Module:
    config = hf.MambaConfig(vocab_size=13, hidden_size=8, state_size=2, num_hidden_layers=1, conv_kernel=3, time_step_rank=2)
    return hf.MambaForCausalLM(config)


def pixels(size: int, count: int = 2) -> Callable[[], Batch]:
    return lambda: {"pixel_values": torch.randn(count, 3, size, size)}


TRANSFORMERS = [
    Architecture(
        "hf_gpt2_conv1d_tied_head",
        gpt2,
        tokens("input_ids"),
        plain=(*BIASES_AND_NORMS, "*.wpe.weight"),
        share=(104 + 448, 104 + 448 + 48 + 52 + 48),
        loss=next_token,
    ),
    Architecture(
        "hf_t5",
        t5,
        tokens("input_ids", "decoder_input_ids"),
        plain=(*BIASES_AND_NORMS, "*relative_attention_bias.weight"),
        share=(104 + 12 * 64 + 4 * 96, 104 + 12 * 64 + 4 * 96 + 2 * 64 + 7 * 8),
        loss=next_token,
    ),
    Architecture(
        "hf_llama",
        llama,
        tokens("input_ids"),
        plain=(*BIASES_AND_NORMS, "model.embed_tokens.weight"),
        share=(192 + 288 + 104, 192 + 288 + 104 + 104 + 24),
        loss=next_token,
    ),
    Architecture(
        "hf_mistral_sliding_window",
        mistral,
        tokens("input_ids"),
        plain=(*BIASES_AND_NORMS, "model.embed_tokens.weight"),
        share=(192 + 288 + 104, 192 + 288 + 104 + 104 + 24),
        loss=next_token,
    ),
    Architecture(
        "hf_vit",
        vit,
        pixels(8),
        plain=(*BIASES_AND_NORMS, "*cls_token", "*position_embeddings", "*layernorm_*.weight"),
        share=(384 + 256 + 192 + 24, 384 + 256 + 192 + 24 + 63 + 48 + 48),
    ),
    Architecture(
        "hf_bert_tied_head",
        bert,
        tokens("input_ids"),
        plain=(*BIASES_AND_NORMS, "*position_embeddings.weight", "*token_type_embeddings.weight"),
        share=(104 + 256 + 192 + 64, 104 + 256 + 192 + 64 + 64 + 64 + 73),
        loss=next_token,
    ),
    Architecture(
        "hf_convnext",
        convnext,
        pixels(8),
        plain=(*BIASES_AND_NORMS, "*layer_scale_parameter", "*downsampling_layer.0.weight"),
        share=(1068, 1068 + 70 + 48 + 10 + 3),
    ),
    Architecture(
        "hf_resnet",
        resnet,
        pixels(16, 4),
        plain=(*BIASES_AND_NORMS, "*normalization.weight"),
        share=(588 + 32 + 60 + 64 + 68 + 24, 588 + 32 + 60 + 64 + 68 + 24 + 88 + 3),
    ),
    Architecture(
        "hf_whisper_tied_head",
        whisper,
        lambda: {"input_features": torch.randn(2, 4, 10), "decoder_input_ids": torch.randint(13, (2, 5))},
        plain=(*BIASES_AND_NORMS, "*embed_positions.weight"),
        share=(288 + 12 * 64 + 4 * 96 + 104, 288 + 12 * 64 + 4 * 96 + 104 + 88 + 16 + 44 + 68 + 48 + 64),
        loss=next_token,
    ),
    Architecture(
        "hf_wav2vec2_weight_norm_inside",
        wav2vec2,
        lambda: {"input_values": torch.randn(2, 60)},
        plain=(*BIASES_AND_NORMS, "masked_spec_embed", "*parametrizations*"),
        share=(16 + 48 + 32 + 256 + 192, 16 + 48 + 32 + 256 + 192 + 8 + 8 + 16 + 140 + 16 + 32 + 16 + 20 + 16),
    ),
    Architecture(
        "hf_mamba",
        mamba,
        tokens("input_ids"),
        plain=(*BIASES_AND_NORMS, "*norm_f.weight", "*A_log", "*.D"),
        share=(48 + 256 + 96 + 32 + 128 + 104, 48 + 256 + 96 + 32 + 128 + 104 + 8 + 32 + 16 + 16 + 16 + 8),
        loss=next_token,
    ),
]
