# pyright: basic
"""PEFT adapters: put around a model, and looked through."""

from __future__ import annotations

from typing import Any

from gpu_pool.records import ModelArgs
from gpu_pool.worker.engine.configs import text_config


def add_adapter(model: Any, args: ModelArgs, tokenizer: Any) -> Any:
    """The adapter on top of `model`, whose embedding is resized first where the tokenizer has other tokens.

    Raises:
        OSError, ValueError: whatever peft says of an adapter that it cannot load.
    """
    from peft import PeftModel

    if text_config(model.config).vocab_size != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, str(args.peft), revision=args.revision or "main")


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_virtual_tokens(model: Any) -> bool:
    """Whether an adapter puts learnt prompt tokens before every sequence."""
    adapter = getattr(model, "active_peft_config", None)
    return bool(adapter is not None and adapter.is_prompt_learning)
