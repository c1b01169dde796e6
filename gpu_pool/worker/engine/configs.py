# pyright: basic
"""What transformers' configurations say, wherever a family of models keeps it."""

from __future__ import annotations

import re
from typing import Any

from gpu_pool.model_size import widest

_WINDOWS = re.compile("window(?!_layers)|chunk_size|block_size|radius|index_topk|local_attention$")
"""Names that configurations have for how many tokens a layer sees, reads together, or chooses."""


def text_config(config: Any) -> Any:
    """The part that describes the language model; all of it where nothing else is described."""
    return getattr(config, "text_config", None) or config


def largest(config: Any, *names: str) -> int:
    """The largest number that `config` gives under any of `names`, for any layer; 0 where it gives none.

    What differs between layers is a list, or stands in the layers' own configs: reading it from the whole raises then.
    """
    return max((widest(getattr(part, name, None)) for part in _parts(config) for name in names), default=0)


def largest_window(config: Any) -> int:
    """The most tokens beyond which some layer may treat a sequence otherwise than a shorter one; 0 for none."""
    fields = (field for part in _parts(config) for field in vars(part).items())
    return max((widest(value) for name, value in fields if _WINDOWS.search(name)), default=0)


def _parts(config: Any) -> list[Any]:
    return config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
