# pyright: basic
"""What transformers' configurations say, wherever a family of models keeps it."""

from __future__ import annotations

from typing import Any

from gpu_pool.model_size import widest


def text_config(config: Any) -> Any:
    """The part that describes the language model; all of it where nothing else is described."""
    return getattr(config, "text_config", None) or config


def largest(config: Any, *names: str) -> int:
    """The largest number that `config` gives under any of `names`, for any layer; 0 where it gives none.

    What differs between layers is a list, or stands in the layers' own configs: reading it from the whole raises then.
    """
    parts = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return max((widest(getattr(part, name, None)) for part in parts for name in names), default=0)
