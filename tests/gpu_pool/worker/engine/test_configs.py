"""What is read from configurations that describe more than one language model of equal layers."""

from __future__ import annotations

from transformers import (
    DogeConfig,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from gpu_pool.worker.engine.configs import largest, largest_window, text_config


def test_the_language_model_of_a_composite_config() -> None:
    composite, alone = Gemma3Config(), LlamaConfig()
    assert text_config(composite) is composite.text_config
    assert text_config(alone) is alone


def test_largest_number_of_all_layers() -> None:
    assert largest(LlamaConfig(intermediate_size=64), "intermediate_size", "n_inner") == 64
    assert largest(LlamaConfig(), "n_inner", "sliding_window") == 0
    listed = Gemma3nTextConfig(num_hidden_layers=3, num_kv_shared_layers=0, intermediate_size=[64, 96, 32])
    assert largest(listed, "intermediate_size") == 96
    apart = Gemma4TextConfig(num_hidden_layers=2, per_layer_config={0: {"intermediate_size": 20_000, "head_dim": 512}})
    assert largest(apart, "intermediate_size") == 20_000
    assert largest(apart, "head_dim") == 512


def test_largest_window() -> None:
    assert largest_window(LlamaConfig()) == largest_window(MistralConfig(sliding_window=None)) == 0
    assert largest_window(MistralConfig(sliding_window=77)) == 77
    assert largest_window(DogeConfig(keep_window_size=2048)) == 2048
    assert largest_window(Qwen2Config(use_sliding_window=False, sliding_window=4096, max_window_layers=28)) == 0
    apart = Gemma4TextConfig(num_hidden_layers=2, per_layer_config={0: {"head_dim": 512}}, sliding_window=9)
    assert largest_window(apart) == 9
