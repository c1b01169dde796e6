# pyright: basic
"""Whether a model can be sharded over several processes by transformers' tensor-parallel plan for it."""

from __future__ import annotations

import re
from typing import Any

from gpu_pool.records import ModelArgs

_HEAD_COUNT = re.compile(r"num_(\w+_)?heads")
"""Names of config fields that count attention heads: each rank computes whole heads."""


def why_not_sharded(config: Any, args: ModelArgs, ranks: int) -> str | None:
    """Why the model of this transformers config cannot be sharded over `ranks` processes; None when it can."""
    if getattr(config, "vision_config", None) is not None:
        return "models that read images are not sharded"
    text_config = config.get_text_config()
    if not getattr(text_config, "base_model_tp_plan", None):
        return f"transformers has no tensor-parallel plan for {text_config.model_type} models"
    if args.peft:
        return "its adapter cannot be sharded with it"
    if args.gguf_file:
        return "GGUF files cannot be sharded"
    if getattr(config, "quantization_config", None) is not None:
        return "its quantised weights cannot be sharded"
    for name, value in text_config.to_dict().items():
        counts = value if isinstance(value, list) else [value]
        if _HEAD_COUNT.search(name) and any(isinstance(count, int) and count % ranks for count in counts):
            return f"its {name} ({value}) cannot be divided by {ranks}"
    return None
