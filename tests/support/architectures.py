"""Configurations of tiny random models, by the way that the engine computes them."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]
"""A config's fields; `model_type` where it is not the name."""

MAX_LENGTH = 256
_WINDOW = {"sliding_window": 16}
_ATTENTION: Settings = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.3,  # wide enough that answers differ from each other
}
_GPT: Settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH, "initializer_range": 0.3}
_RECURRENT: Settings = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
_INPUTS_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512}
_MIXED_WINDOWS = _WINDOW | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64} | {
    "max_position_embeddings": MAX_LENGTH
}

TREE: dict[str, Settings] = {
    "cohere": _ATTENTION,
    "cohere2": _ATTENTION | _WINDOW,
    "deepseek_v3": _ATTENTION
    | _EXPERTS
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "exaone4": _ATTENTION | _WINDOW,
    "gemma2": _ATTENTION | _WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": _ATTENTION | _WINDOW | {"query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "gemma3n_text": _ATTENTION
    | _MIXED_WINDOWS
    | _INPUTS_PER_LAYER
    | {"num_kv_shared_layers": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
    | {"intermediate_size": [64, 64, 96, 96]},
    "gemma4_text": _ATTENTION | _MIXED_WINDOWS | _INPUTS_PER_LAYER | {"global_head_dim": 16},
    "glm4_moe": _ATTENTION | _EXPERTS | _GROUPS | {"n_routed_experts": 4, "num_key_value_heads": 4},
    "gpt2": _GPT,
    "gpt_neox": _ATTENTION,
    "gpt_oss": _ATTENTION | _WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": _ATTENTION | {"logits_scaling": 2.0},
    "granitemoe": _ATTENTION | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": _ATTENTION,
    "longrope": _ATTENTION
    | {"model_type": "phi3", "original_max_position_embeddings": 64}
    | {"rope_parameters": _LONGROPE | {"original_max_position_embeddings": 64}},
    "ministral3": _ATTENTION | {"rope_parameters": _YARN | {"llama_4_scaling_beta": 0.5}},
    "mistral": _ATTENTION | _WINDOW,
    "mixtral": _ATTENTION | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": _ATTENTION,
    "olmo3": _ATTENTION | _WINDOW,
    "opt": _ATTENTION | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi3": _ATTENTION,
    "qwen2": _ATTENTION,
    "qwen2_moe": _ATTENTION | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3": _ATTENTION | _WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": _ATTENTION | _EXPERTS | {"num_experts": 4},
    "smollm3": _ATTENTION,
    "starcoder2": _ATTENTION | _WINDOW,
}
"""Each distinct token is computed once."""
PLAIN: dict[str, Settings] = {
    "bamba": _ATTENTION | _STATES | {"attn_layer_indices": [1]},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "initializer_range": 0.3},
    "falcon": _RECURRENT | {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": _ATTENTION | _STATES | {"mamba_d_ssm": 64},
    "falcon_mamba": _RECURRENT | {"state_size": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    | {"window_size": 16, "max_position_embeddings": MAX_LENGTH, "initializer_range": 0.3},
    "gptj": _GPT | {"rotary_dim": 8},
    "granitemoehybrid": _ATTENTION
    | _STATES
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"shared_intermediate_size": 32},
    "jamba": _ATTENTION
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "llama4_text": _ATTENTION
    | {"num_hidden_layers": 4, "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "mamba": _RECURRENT | {"state_size": 4},
    "mamba2": _RECURRENT
    | {"state_size": 8, "head_dim": 8, "num_heads": 8, "expand": 2, "n_groups": 1, "chunk_size": 16},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": MAX_LENGTH, "initializer_range": 0.3},
    "qwen3_next": _ATTENTION
    | _EXPERTS
    | _LINEAR
    | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": _ATTENTION | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "rwkv": _RECURRENT | {"context_length": MAX_LENGTH},
    "zamba2": _ATTENTION
    | {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "chunk_size": 16, "num_mem_blocks": 1}
    | {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
}
"""Whole sequences are computed, in padded batches: by what `routes` finds in their configs."""
BIDIRECTIONAL: dict[str, Settings] = {
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.3},
}
"""The plain way, and padding is looked at from both sides. Their configs bound no length."""
CHOOSY: dict[str, Settings] = {
    "doge": _ATTENTION | {"keep_window_size": 16},
}
"""The plain way, and beyond their window they choose keys among all of a batch's width."""
