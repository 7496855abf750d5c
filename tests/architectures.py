"""A tiny random model of every causal type that transformers has, built from the type's own config.

A size is set by what a config calls it. What hangs together in another way (widths of latent attention, which layers
hold states, lists with an entry for each layer) is said by type.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers as T
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from errata import LM
from tests import tiny

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Model types, as transformers names them."""

LARGEST = 15_000_000
"""Parameters of a tiny model, at most: a config that nothing here makes small is not tried."""

SIZES = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group n_groups mamba_n_groups "
    "mamba_ngroups first_k_dense_replace num_dense_layers moe_layer_start_index",
    2: "num_key_value_heads multi_query_num_kv_heads num_experts_per_tok num_experts_per_token experts_per_token "
    "moe_top_k moe_k moe_topk num_selected_experts linear_num_key_heads",
    4: "num_hidden_layers n_layer n_layers num_layers num_blocks encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_moe_experts mamba_n_heads n_mamba_heads mamba_num_heads linear_num_value_heads",
    6: "sliding_window window_size attention_window_size",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim state_size ssm_state_size mamba_d_state mamba_chunk_size "
    "chunk_size laurel_rank",
    16: "head_dim v_head_dim qk_head_dim global_head_dim attention_head_size kv_channels kv_lora_rank q_lora_rank "
    "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input",
    32: "mamba_d_head mamba_headdim mamba_head_dim",
    48: "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size moe_ffn_hidden_size",
    64: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size embedding_dim encoder_hidden_size "
    "decoder_hidden_size word_embed_proj_dim lru_width",
    80: "shared_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size",
    128: "max_position_embeddings original_max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "max_source_positions",
    160: "intermediate_size intermediate_size_mlp ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size n_inner dff "
    "d_inner dim_ff feed_forward_size",
}
INITIAL = ("initializer_range", "init_std")
"""Wider than usual, so that random blocks have something to say."""

LATENT = dict(head_dim=8, qk_head_dim=16, num_key_value_heads=4)
STATES = ["linear_attention", "full_attention"] * 2
PADDED = dict(pad_token_id=1)
ROPE = dict(rope_type="default", rope_theta=10_000.0)
HAND: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), LATENT
    ),
    **dict.fromkeys(("camembert", "data2vec-text", "prophetnet", "roberta", "roberta-prelayernorm"), PADDED),
    **dict.fromkeys(("xglm", "xlm-roberta", "xlm-roberta-xl"), PADDED),
    "bailing_hybrid": dict(LATENT, layer_group_size=2),
    "bamba": dict(attn_layer_indices=[1], mamba_expand=2),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
    ),
    "dbrx": dict(
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10_000.0),
    ),
    "deepseek_v2": dict(LATENT, topk_method="greedy"),
    "dots3_note_text": dict(
        per_layer_config={},
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_nope_head_dim=8,
        index_head_dim=16,
        index_n_heads=4,
    ),
    "falcon_h1": dict(mamba_d_ssm=128, mamba_expand=2),
    "falcon_mamba": dict(time_step_rank=8, intermediate_size=128),
    "gemma3n_text": dict(num_kv_shared_layers=0, intermediate_size=[160] * 4, activation_sparsity_pattern=[0.0] * 4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=STATES, mamba_expand=2),
    "jamba": dict(
        mamba_dt_rank=8,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "kimi_linear": dict(layer_types=STATES, num_key_value_heads=4, linear_head_dim=16, linear_num_heads=4),
    "lfm2": dict(full_attn_idxs=[1, 3], block_auto_adjust_ff_dim=False),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "longcat_flash": dict(LATENT, num_hidden_layers=8, zero_expert_num=2),
    "mamba": dict(time_step_rank=8, intermediate_size=128),
    "mamba2": dict(num_heads=4, head_dim=32),
    "minimax": dict(layer_types=STATES, block_size=8),
    "modernbert-decoder": dict(local_attention=8),
    "mpt": dict(expansion_ratio=2),
    "nemotron_h": dict(layers_block_type=["linear_attention", "mlp", "full_attention", "moe"], mamba_proj_bias=False),
    "phi3": dict(rope_scaling=None),
    "phimoe": dict(rope_scaling=None),
    "qwen3_next": dict(decoder_sparse_step=1),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=16, indexer_compress_ratio=4
    ),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"], attention_window_size=8),
    "reformer": dict(
        is_decoder=True,
        axial_pos_shape=[8, 16],
        axial_pos_embds_dim=[32, 32],
        attn_layers=["local"] * 4,
        local_attn_chunk_length=8,
    ),
    "roc_bert": dict(PADDED, pronunciation_vocab_size=50, shape_vocab_size=50),
    "rwkv": dict(attention_hidden_size=64, context_length=128),
    "xlm": dict(causal=True),
    "xmod": dict(PADDED, default_language="en_XX", languages=["en_XX"]),
    "zamba": dict(
        layers_block_type=["mamba", "hybrid"] * 2,
        mamba_dt_rank=8,
        n_mamba_heads=2,
        attention_head_dim=32,
        attention_hidden_size=128,
        use_mamba_kernels=False,
    ),
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid"] * 2, hybrid_layer_ids=[1, 3], num_mem_blocks=1, adapter_rank=8
    ),
    "zaya": dict(num_experts_per_tok=1),
}


def build(kind: str, **settings: Any) -> LM:
    """A tiny random model with GPT-2's kind of tokenizer.

    Args:
        kind: one of `KINDS`.
        settings: of its config, over those here.

    Raises:
        Exception: of whatever kind transformers raises, where this makes no config that it takes.
    """
    tokenizer = tiny.bpe()
    torch.manual_seed(0)
    made = config(kind, len(tokenizer), **settings)
    with torch.device("meta"):
        size = sum(p.numel() for p in T.AutoModelForCausalLM.from_config(copy.deepcopy(made)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are not tiny")
    torch.manual_seed(0)
    return LM(T.AutoModelForCausalLM.from_config(made).eval(), tokenizer, name=kind)


def config(kind: str, vocabulary: int, **settings: Any) -> Any:
    """The config of a type, all of whose sizes are small."""
    own = CONFIG_MAPPING[kind]
    return own(**(_small(own(), vocabulary) | HAND.get(kind, {}) | settings))


def _small(config: Any, vocabulary: int) -> dict[str, Any]:
    """Settings that make a config small, with those of the configs in it."""
    wanted: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
    wanted |= dict.fromkeys(INITIAL, 0.12)
    wanted |= dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), vocabulary)
    wanted |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    aliases: Mapping[str, str] = getattr(config, "attribute_map", {})
    there = set(config.to_dict()) | set(aliases)
    out = {name: value for name, value in wanted.items() if name in there and _single(config, name)}
    for alias, name in aliases.items():
        if name in out:
            out.pop(alias, None)
    for name in getattr(config, "sub_configs", {}) or {}:
        part = getattr(config, name, None)
        if part is not None:
            out[name] = _small(part, vocabulary) | HAND.get(part.model_type, {}) | {"model_type": part.model_type}
    return out


def _single(config: Any, name: str) -> bool:
    """Whether a setting is one for all layers."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers says by an error of its own that layers differ
        return False
    return not isinstance(value, list | dict) and (value is not None or "window" not in name)
