"""Self-fusion of networks of many families of transformers, built from configurations with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sop.growth import FusionError, fuse
from tests.growth.architectures import hugging_face, trained

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 50, (2, 10), generator=GENERATOR)
TEXT = {"input_ids": IDS}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32, generator=GENERATOR)}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
COMMON = {
    "vocab_size": 50,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# name: configuration, model, what is small, what is wide, what both have, and what they are called with
FAMILIES: dict[str, tuple[Any, ...]] = {
    "GPTNeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL, WIDE, COMMON, TEXT),
    "OPT": (
        "OPTConfig",
        "OPTForCausalLM",
        {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16},
        {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        COMMON,
        TEXT,
    ),
    "Mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {**SMALL, "num_key_value_heads": 1},
        {**WIDE, "num_key_value_heads": 2},
        COMMON,
        TEXT,
    ),
    "Qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**SMALL, "num_key_value_heads": 1},
        {**WIDE, "num_key_value_heads": 2},
        {**COMMON, "tie_word_embeddings": True},
        TEXT,
    ),
    "Qwen3": (
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 8},
        {**WIDE, "num_key_value_heads": 2, "head_dim": 8},
        COMMON,
        TEXT,
    ),
    "Gemma": (
        "GemmaConfig",
        "GemmaForCausalLM",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 8},
        {**WIDE, "num_key_value_heads": 2, "head_dim": 8},
        COMMON,
        TEXT,
    ),
    "Gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**SMALL, "num_key_value_heads": 1, "head_dim": 8},
        {**WIDE, "num_key_value_heads": 2, "head_dim": 8},
        COMMON,
        TEXT,
    ),
    "Phi": ("PhiConfig", "PhiForCausalLM", SMALL, WIDE, COMMON, TEXT),
    "Phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {**SMALL, "num_key_value_heads": 2},
        {**WIDE, "num_key_value_heads": 4},
        COMMON,
        TEXT,
    ),
    "Falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"hidden_size": 16, "num_attention_heads": 2},
        {"hidden_size": 32, "num_attention_heads": 4},
        {
            "vocab_size": 50,
            "num_hidden_layers": 2,
            "multi_query": False,
            "alibi": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        TEXT,
    ),
    "Roberta": ("RobertaConfig", "RobertaForSequenceClassification", SMALL, WIDE, COMMON, TEXT),
    "DistilBert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 16, "hidden_dim": 32, "n_heads": 2},
        {"dim": 32, "hidden_dim": 64, "n_heads": 4},
        {"vocab_size": 50, "n_layers": 2, "max_position_embeddings": 32},
        TEXT,
    ),
    "Albert": (
        "AlbertConfig",
        "AlbertForSequenceClassification",
        {**SMALL, "embedding_size": 16},
        {**WIDE, "embedding_size": 32},
        COMMON,
        TEXT,
    ),
    "Electra": (
        "ElectraConfig",
        "ElectraForSequenceClassification",
        {**SMALL, "embedding_size": 16},
        {**WIDE, "embedding_size": 32},
        COMMON,
        TEXT,
    ),
    "Deberta2": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        SMALL,
        WIDE,
        {**COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16},
        TEXT,
    ),
    "Bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
        {
            "d_model": 32,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
        {
            "vocab_size": 50,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        TEXT,
    ),
    "Whisper": (
        "WhisperConfig",
        "WhisperModel",
        {
            "d_model": 16,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
        {
            "d_model": 32,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
        {
            "vocab_size": 50,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
        {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": IDS},
    ),
    "DeiT": (
        "DeiTConfig",
        "DeiTForImageClassification",
        SMALL,
        WIDE,
        {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2},
        IMAGES,
    ),
    "Dinov2": (
        "Dinov2Config",
        "Dinov2ForImageClassification",
        {"hidden_size": 16, "num_attention_heads": 2},
        {"hidden_size": 32, "num_attention_heads": 4},
        {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2},
        IMAGES,
    ),
    "Beit": (
        "BeitConfig",
        "BeitForImageClassification",
        SMALL,
        WIDE,
        {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "use_relative_position_bias": True},
        IMAGES,
    ),
    "Swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"embed_dim": 8, "num_heads": [1, 2]},
        {"embed_dim": 16, "num_heads": [2, 4]},
        {"image_size": 32, "patch_size": 2, "depths": [1, 1], "window_size": 4},
        IMAGES,
    ),
    "ConvNext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [4, 8]},
        {"hidden_sizes": [8, 16]},
        {"num_stages": 2, "depths": [1, 1]},
        IMAGES,
    ),
    "ResNetHF": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [8, 16]},
        {"embedding_size": 8, "hidden_sizes": [16, 32]},
        {"depths": [1, 1]},
        IMAGES,
    ),
    "MobileNetV2": (
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25, "min_depth": 8},
        {"depth_multiplier": 0.5, "min_depth": 16},
        {"image_size": 32},
        IMAGES,
    ),
    "RegNet": (
        "RegNetConfig",
        "RegNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [8, 16]},
        {"embedding_size": 8, "hidden_sizes": [16, 32]},
        {"depths": [1, 1], "groups_width": 4},
        IMAGES,
    ),
    "SegFormer": (
        "SegformerConfig",
        "SegformerForImageClassification",
        {"hidden_sizes": [8, 16], "num_attention_heads": [1, 2]},
        {"hidden_sizes": [16, 32], "num_attention_heads": [2, 4]},
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "mlp_ratios": [2, 2],
        },
        IMAGES,
    ),
    "Mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**SMALL, "num_key_value_heads": 1},
        {**WIDE, "num_key_value_heads": 2},
        {**COMMON, "num_local_experts": 2},
        TEXT,
    ),
    "CLIPtext": ("CLIPTextConfig", "CLIPTextModel", SMALL, WIDE, COMMON, TEXT),
    "GPTJ": (
        "GPTJConfig",
        "GPTJForCausalLM",
        {"n_embd": 16, "n_head": 2},
        {"n_embd": 32, "n_head": 4},
        {"vocab_size": 50, "n_layer": 2, "n_positions": 32, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2},
        TEXT,
    ),
}

REFUSED: dict[str, tuple[Any, ...]] = {
    "Bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"hidden_size": 16, "n_head": 2},
        {"hidden_size": 32, "n_head": 4},
        {"vocab_size": 50, "n_layer": 2},
        TEXT,
    ),
    "Mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"hidden_size": 16, "intermediate_size": 32},
        {"hidden_size": 32, "intermediate_size": 64},
        {"vocab_size": 50, "num_hidden_layers": 2, "state_size": 4},
        TEXT,
    ),
    "Wav2Vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        {**SMALL, "conv_dim": [8, 8], "num_conv_pos_embedding_groups": 2},
        {**WIDE, "conv_dim": [16, 16], "num_conv_pos_embedding_groups": 4},
        {
            "num_hidden_layers": 2,
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "vocab_size": 20,
        },
        {"input_values": torch.randn(2, 400)},
    ),
    "XLNet": (
        "XLNetConfig",
        "XLNetForSequenceClassification",
        {"d_model": 16, "n_head": 2, "d_inner": 32},
        {"d_model": 32, "n_head": 4, "d_inner": 64},
        {"vocab_size": 50, "n_layer": 2},
        TEXT,
    ),
}


def models(family: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    config, model, small, wide, common, probe = family
    torch.manual_seed(0)
    make = hugging_face(config, model)
    return trained(make(**small, **common)), make(**wide, **common), probe


@pytest.mark.parametrize("name", FAMILIES)
def test_self_fusion_keeps_the_function(name: str) -> None:
    donor, wide, probe = models(FAMILIES[name])
    proof = fuse([donor, donor], wide, probe).proof
    assert proof.promised
    assert proof.gap <= 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_follows_the_width_by_itself_is_refused_by_name(name: str) -> None:
    """Slopes by the number of heads, one selection for all channels, a norm over all kernels, sinusoids of the width."""
    donor, wide, probe = models(REFUSED[name])
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    with pytest.raises(FusionError, match=r"\w+\.\w+"):
        fuse([donor, donor], wide, probe)
    assert all(torch.equal(value, before[key]) for key, value in wide.state_dict().items())
