"""Tiny random dense models of every family: one generic config, and a table of what single families need besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from st_moe.modeling.routing import Router

VOCAB, HIDDEN, WIDTH, LAYERS, HEADS = 96, 32, 48, 2, 4

#: Fields under the names that most families use; a family takes those that it has.
GENERIC: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": WIDTH,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Encoder-decoders: the decoder alone is a causal language model, and it has fewer layers here than the encoder.
    "encoder_layers": LAYERS + 1,
    "num_encoder_layers": LAYERS + 1,
    "decoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "num_encoder_attention_heads": HEADS,
    "num_decoder_attention_heads": HEADS,
    "encoder_ffn_dim": WIDTH,
    "decoder_ffn_dim": WIDTH,
    # Low-rank and linear attention, state-space mixers.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    # Families with experts of their own: few and small ones, in all layers but the first.
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense", "sparse"],
    # Images.
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}

_LOCAL_AND_GLOBAL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_VISION = {name: GENERIC[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
_VISION |= {name: GENERIC[name] for name in ("intermediate_size", "image_size", "patch_size")}
_LATENT = {"num_key_value_heads": HEADS}
_GEMMA_4 = {**_LOCAL_AND_GLOBAL, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}

#: What single families name differently, or what makes a tiny model exercise the family's own ways.
OWN_FIELDS: Mapping[str, Mapping[str, Any]] = {
    **{family: {"vision_config": _VISION} for family in ("siglip", "clip", "metaclip_2")},
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(("dots3_note_text", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    "bailing_hybrid": _LATENT | _LINEAR_AND_FULL,
    "bamba": {"attn_layer_indices": [1]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere_compass_text": {
        **_LOCAL_AND_GLOBAL,
        "rope_parameters": dict.fromkeys(_LOCAL_AND_GLOBAL["layer_types"], _ROPE),
    },
    "cpmant": {"dim_head": 8, "dim_ff": WIDTH, "prompt_length": 4, "prompt_types": 8},
    "ctrl": {"dff": WIDTH},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mlp_multipliers": [0.5, 0.75]},
    "gemma2": _LOCAL_AND_GLOBAL,
    "gemma3_text": _LOCAL_AND_GLOBAL,
    # Widths that differ between layers, and one layer with activation sparsity.
    "gemma3n_text": {
        **_GEMMA_4,
        "intermediate_size": [WIDTH, WIDTH + 16],
        "activation_sparsity_pattern": [0.5, 0.0],
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
    },
    "gemma4_text": {**_GEMMA_4, "num_hidden_layers": 4, "layer_types": _LOCAL_AND_GLOBAL["layer_types"] * 2}
    | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gemma4_unified_text": {**_GEMMA_4, "num_hidden_layers": 4, "layer_types": _LOCAL_AND_GLOBAL["layer_types"] * 2}
    | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gpt2": {"n_inner": WIDTH},
    "gpt_bigcode": {"n_inner": WIDTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _LINEAR_AND_FULL
    | {"num_local_experts": 0, "shared_intermediate_size": WIDTH, "residual_multiplier": 0.7},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": _LATENT | _LINEAR_AND_FULL | {"linear_head_dim": 8, "linear_num_heads": HEADS},
    "llama4_text": {"moe_layers": [1], "intermediate_size_mlp": WIDTH, "no_rope_layers": [1, 0]},
    "hrm_text": {"H_cycles": 2, "L_cycles": 2},
    "imagegpt": {"n_inner": WIDTH},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "minicpm3": {"num_key_value_heads": HEADS},
    "ministral": {"sliding_window": 6},
    "mistral": {"sliding_window": 6},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
        # Experts that this model does not have; their sizes are read all the same.
        "n_routed_experts": 2,
        "moe_intermediate_size": WIDTH,
        "moe_shared_expert_intermediate_size": WIDTH,
    },
    # The norm behind its FFN should hide the FFN's scale entirely, which a large epsilon would not let it.
    "olmo2": {"rms_norm_eps": 1e-9},
    "olmo_hybrid": _LINEAR_AND_FULL,
    "opt": {"ffn_dim": WIDTH, "word_embed_proj_dim": HIDDEN},
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_next": _LINEAR_AND_FULL,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": HIDDEN},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCAB,
        "pronunciation_vocab_size": VOCAB,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "whisper": {"max_target_positions": 64, "begin_suppress_tokens": None},
    "xglm": {"ffn_dim": WIDTH},
    "xlm": {"is_encoder": True},
    "xlstm": {"hidden_size": 128, "num_heads": 2, "ffn_round_up_to_multiple_of": 16, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "youtu": {
        "num_key_value_heads": HEADS,
        "initializer_range": 0.02,
        "embedding_initializer_range": 0.02,
        # With one, the host zeroes its embedding again whenever a checkpoint, dense or sparse, is loaded.
        "pad_token_id": None,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "use_mamba_kernels": False,
    },
}


def tiny_config(family: str, **fields: Any) -> PreTrainedConfig:
    """A dense config of the family small enough for a test; `fields` win."""
    config_class = CONFIG_MAPPING[family]
    known = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    # A name that stands for another field gives way to that field.
    fields_of = {field for field in config_class.__dataclass_fields__ if field in GENERIC}
    aliased = {alias for alias, field in config_class.attribute_map.items() if field in fields_of}
    wanted = {name: value for name, value in GENERIC.items() if name in known - aliased}
    own: Mapping[str, Any] = OWN_FIELDS.get(family, {})
    if "num_hidden_layers" in fields:
        own = {name: value for name, value in own.items() if not isinstance(value, list)}
    return config_class(**{**wanted, **own, **fields})


@torch.no_grad()
def perturb(model: nn.Module, std: float = 0.05, seed: int = 0) -> None:
    """Move every parameter off its initial value, so that no norm is 1 and no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += torch.randn(parameter.shape, generator=generator) * std


@torch.no_grad()
def sharpen(model: nn.Module, factor: float = 10.0) -> None:
    """Scale the routers up, so that their choices differ between tokens."""
    for module in model.modules():
        if isinstance(module, Router) and "weight" in module._parameters:
            module.weight *= factor


@torch.no_grad()
def favour_experts(model: nn.Module, std: float = 0.1, seed: int = 5) -> None:
    """Move the selection biases of routers that have them off zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer += std * torch.randn(buffer.shape, generator=generator)


def dense_model(family: str, auto: Any = AutoModelForCausalLM, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A dense model with perturbed random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = auto.from_config(tiny_config(family, **fields)).eval()
    perturb(model, seed=seed + 1)
    return model
