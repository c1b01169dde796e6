import logging

import pytest
from transformers import AutoConfig

from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.loading import choose_ranks
from gpu_pool.worker.engine.sharding import why_not_sharded

ARGS = ModelArgs(pretrained="somewhere")


@pytest.mark.parametrize(
    ("model_type", "settings", "ranks", "reason"),
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, 2, None),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, 4, "its num_key_value_heads (2)"),
        (
            "llama",
            {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3},
            2,
            "its num_key_value_heads",
        ),
        ("gpt_neox", {"num_attention_heads": 8}, 4, None),
        ("gemma2", {"num_attention_heads": 8, "num_key_value_heads": 4}, 4, None),
        ("mixtral", {"num_attention_heads": 8, "num_key_value_heads": 4}, 4, None),
        ("gpt2", {"n_head": 4}, 2, "transformers has no tensor-parallel plan for gpt2 models"),
        ("mamba", {}, 2, "transformers has no tensor-parallel plan for mamba models"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, 2, "its quantised weights"),
    ],
)
def test_by_the_config(model_type, settings, ranks, reason):
    found = why_not_sharded(AutoConfig.for_model(model_type, **settings), ARGS, ranks)
    assert found is None if reason is None else found and found.startswith(reason)


@pytest.mark.parametrize("args", [{"peft": "adapter"}, {"gguf_file": "model.gguf"}])
def test_by_the_arguments(args):
    assert why_not_sharded(AutoConfig.for_model("llama"), ModelArgs(pretrained="somewhere", **args), 2)


def test_on_gpus_layers_are_spread_instead(checkpoint, caplog):
    args = ModelArgs(pretrained=str(checkpoint("gpt2")))
    spec = ModelSpec(kind="hf", args=args, fingerprint="", device="cuda")
    with caplog.at_level(logging.WARNING):
        assert choose_ranks(spec, 2, allow_remote_code=False) == 1
    assert "no tensor-parallel plan" in caplog.text
