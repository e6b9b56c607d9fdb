"""Tiny random models of every family in transformers' causal-LM mapping, built from a configuration alone.

A family's default configuration is shrunk field by field (`SIZES`), wherever it has the field, also in nested
configurations; what a family needs beyond that stands in one table (`EXTRAS`). Weights are random and large enough
that attention matters. Knows nothing of pruning.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

BACKENDS = ("sdpa", "eager")
VOCABULARY, LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 128, 6, 32, 4, 2, 8

# Field -> value, given to every configuration that has the field; what is one size has many names.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads",
                     "num_decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads",), KV_HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim"), HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "experts_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts",
                     "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers",
                     "moe_layer_start_index"), 1),
    "qk_rope_head_dim": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "is_decoder": True, "tie_word_embeddings": False,
    "num_experts_per_tok": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "rotary_dim": 4, "window_size": 24,
    "sliding_window_size": 24, "dim_head": HEAD_DIM, "dim_ff": 64, "global_head_dim": HEAD_DIM,
    "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": KV_HEADS, "swa_head_dim": HEAD_DIM,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16,
    "position_bias_num_buckets": 32, "prompt_types": 4, "segment_types": 4, "prompt_length": 4,
    "pronunciation_embed_dim": 16, "pronunciation_vocab_size": 32, "shape_embed_dim": 16, "shape_vocab_size": 32,
    "dropout": 0.0, "hidden_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip

# model_type[:variant] -> what its tiny configuration needs beyond the sizes, or what makes it a further variant.
_FULL, _WINDOW, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_PLACEHOLDERS = ("image", "video", "audio", "boi", "eoi", "boa")
EXTRAS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gpt_neo": {"num_heads": HEADS, "attention_types": [[["global", "local"], 3]]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": [_WINDOW, _FULL] * 3,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma3n_text:shared": {"num_kv_shared_layers": 2},
    "gemma4_text:shared": {"num_kv_shared_layers": 2, "layer_types": [_WINDOW, _FULL] * 3},
    "gemma4_text:bidirectional": {"use_bidirectional_attention": "all"},
    "gemma3_text:bidirectional": {"use_bidirectional_attention": True},
    # Its own ids lie outside a tiny vocabulary, and it looks them up.
    "gemma4": {f"{name}_token_id": VOCABULARY - 1 - place for place, name in enumerate(_PLACEHOLDERS)},
    "falcon": {"new_decoder_architecture": False, "multi_query": False, "num_ln_in_parallel_attn": None},
    "falcon:alibi": {"alibi": True},
    "falcon:new": {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
    "falcon:multi_query": {"multi_query": True},
    "llama4_text:chunks": {"attention_chunk_size": 24},
    "qwen2:window": {"use_sliding_window": True, "max_window_layers": 2},
    "doge:moe": {"is_moe": True},
    "falcon_h1": {"mamba_d_ssm": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", _FULL] * 3},
    "lfm2": {"layer_types": ["conv", _FULL] * 3},
    "lfm2:attention": {"layer_types": [_FULL] * LAYERS},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama": {"is_decoder": None},
    "dots3_note_text": {"per_layer_config": {}},
    "bamba": {"attn_layer_indices": [1, 3, 5]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "longcat_flash": {"num_layers": LAYERS // 2, "zero_expert_num": 2, "ffn_hidden_size": 64},
    "moshi": {"audio_vocab_size": 64},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "num_attention_heads": 2,
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "attn_layers": ["local", "lsh"] * 3,
    },
    "xlstm": {"num_heads": 2, "chunk_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 3, "hybrid_layer_ids": [1, 3, 5]},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "codegen": {"n_inner": 64},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "layer_types": [_WINDOW, _FULL] * 3,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in (_WINDOW, _FULL)},
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "model_max_length": 512},
    "qwen4_exp_text": {
        "layer_types": [_LINEAR, _FULL] * 3,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [],
        "hc_lowrank": 8,
        "hc_count": 2,
    },
}


def families() -> list[str]:
    """Every ``model_type`` of the causal-LM mapping, then the variants named in `EXTRAS`."""
    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    named = [name for name in EXTRAS if ":" in name and name.split(":")[0] in known]
    # One window for all layers: real models of one family come with and without (but Moshi only with).
    windowed = [name for name in known if _one_window(name) and name != "moshi"]
    return known + [f"{name}:{other_window(name)}" for name in windowed] + named


def default_backend(name: str) -> str:
    """sdpa where the family has it, else eager."""
    with contextlib.suppress(Exception):
        weightless_model(name, "sdpa")
        return "sdpa"
    return "eager"


def _one_window(model_type: str) -> bool:
    fields = _fields(CONFIG_MAPPING[model_type])
    return "sliding_window" in fields and "layer_types" not in fields


def other_window(model_type: str) -> str:
    """Which variant of a family with one window for all layers is not its default: ``"window"`` or ``"full"``."""
    return "window" if CONFIG_MAPPING[model_type]().sliding_window is None else "full"


def _fields(kind: type) -> set[str]:
    """Names that a configuration class takes."""
    return set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", ()))


def tiny_config(name: str) -> PretrainedConfig:
    """The smallest configuration of ``name`` (``model_type`` or ``model_type:variant``) that still has every part."""
    model_type = name.split(":")[0]
    extras = {**EXTRAS.get(model_type, {}), **EXTRAS.get(name, {})}
    if name.endswith((":full", ":window")) and name not in EXTRAS:
        extras["sliding_window"] = None if name.endswith(":full") else SIZES["sliding_window"]
    elif "sliding_window" not in extras and "layer_types" not in _fields(CONFIG_MAPPING[model_type]):
        extras |= {"sliding_window": None} if getattr(CONFIG_MAPPING[model_type](), "sliding_window", 0) is None else {}
    return _shrunk(CONFIG_MAPPING[model_type], extras)


def _shrunk(kind: type, extras: dict[str, Any]) -> PretrainedConfig:
    fields = _fields(kind)
    values = {name: value for name, value in SIZES.items() if name in fields}
    for name, sub in (getattr(kind, "sub_configs", None) or {}).items():
        if sub is AutoConfig:  # any kind: of the kind that it is by default
            sub = type(getattr(kind(), name, None))
        if sub is not None and hasattr(sub, "model_type") and name not in extras and sub.model_type in CONFIG_MAPPING:
            values[name] = _shrunk(sub, {}).to_dict()
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = HEADS  # latent attention has a key for each query head
    values |= extras
    return kind(**values)


def parameter_count(name: str, backend: str) -> int:
    """Numbers in the weights of `tiny_model`, without making them."""
    return sum(parameter.numel() for parameter in weightless_model(name, backend).parameters())


def weightless_model(name: str, backend: str) -> nn.Module:
    """The same modules on torch's meta device: enough to ask whether they would be pruned."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation=backend).eval()


def tiny_model(name: str, backend: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A random model in eval mode, always the same for the same arguments."""
    config = tiny_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Grouped expert kernels know no float64, and torch does not count their FLOPs.
        experts = {"experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_config(config, attn_implementation=backend, dtype=dtype, **experts)
        model = model.to(dtype).eval().requires_grad_(False)
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in parameter_name for part in ("embed", "wte", "wpe")):
                parameter.mul_(5)  # transformers' 0.02 makes attention nearly uniform: a wrong mask would hardly show
    return model
