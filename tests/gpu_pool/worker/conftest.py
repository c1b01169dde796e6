"""Tiny random checkpoints of several architectures, all with the tokenizer of `tiny_model`; workers to load them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from architectures import BIDIRECTIONAL, CHOOSY, PLAIN, TREE
from worker_process import WorkerProcess

from gpu_pool.messages import WorkerStart

Checkpoint = Callable[..., Path]

_T5: dict[str, Any] = {
    **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "n_positions": 256},
    **{"num_decoder_layers": 2, "tie_word_embeddings": False, "decoder_start_token_id": 0},
}
_BART: dict[str, Any] = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256},
    **{"init_std": 0.3, "decoder_start_token_id": 2},
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "mt5": _T5 | {"feed_forward_proj": "gated-gelu"},
    "umt5": _T5 | {"feed_forward_proj": "gated-gelu"},
    "longt5": _T5 | {"encoder_attention_type": "transient-global", "local_radius": 4, "global_block_size": 4},
    "switch_transformers": _T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "bart": _BART,
    "marian": _BART,  # which forces an end token whose id is 0
    "mbart": _BART,
    "m2m_100": _BART,
    "pegasus": _BART,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Checkpoint:
    """`checkpoint("gpt2", seed=1)`: the folder of a random fp32 checkpoint of that architecture, made once."""
    made: dict[tuple[str, int], Path] = {}

    def make(name: str, seed: int = 0) -> Path:
        if (name, seed) not in made:
            made[name, seed] = tmp_path_factory.mktemp(name)
            save_random_model(made[name, seed], name, seed, tiny_model)
        return made[name, seed]

    return make


@pytest.fixture
def spawn_worker() -> Iterator[Callable[[WorkerStart], WorkerProcess]]:
    """Start a worker of the test's own."""
    started: list[WorkerProcess] = []

    def spawn(start: WorkerStart) -> WorkerProcess:
        started.append(WorkerProcess(start))
        return started[-1]

    yield spawn
    for process in started:
        process.close()


def save_random_model(folder: Path, name: str, seed: int, tokenizer_folder: Path) -> None:
    """Write a random checkpoint of the architecture `name` into `folder`, over what is there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {"model_type": name} | {**TREE, **PLAIN, **BIDIRECTIONAL, **CHOOSY, **ENCODER_DECODERS}[name]
    config = AutoConfig.for_model(vocab_size=len(tokenizer), **ids, **settings)
    torch.manual_seed(seed)
    loader = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    loader.from_config(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
