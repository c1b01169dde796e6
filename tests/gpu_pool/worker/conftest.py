"""Tiny random checkpoints of several architectures, all with the tokenizer of `tiny_model`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Checkpoint = Callable[..., Path]

_ATTENTION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # wide enough that answers differ from each other
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _ATTENTION,
    "mistral": _ATTENTION | {"sliding_window": 16},
    "gemma2": _ATTENTION | {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Checkpoint:
    """`checkpoint("gpt2", seed=1)`: the folder of a random fp32 checkpoint of that model type, made once."""
    made: dict[tuple[str, int], Path] = {}

    def make(model_type: str, seed: int = 0) -> Path:
        if (model_type, seed) not in made:
            made[model_type, seed] = tmp_path_factory.mktemp(model_type)
            save_random_model(made[model_type, seed], model_type, seed, tiny_model)
        return made[model_type, seed]

    return make


def save_random_model(folder: Path, model_type: str, seed: int, tokenizer_folder: Path) -> None:
    """Write a random checkpoint into `folder`, over what is there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **ids, **SETTINGS[model_type])
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
