"""Generation options of lmms-eval's tasks, as its models read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_pool.gen_kwargs import KNOWN_KEYS, LENGTH_KEYS

DEFAULT_MAX_NEW_TOKENS = 1024
"""Where neither task nor request says how long an answer may be; lmms-eval's models differ (128 to 32,768)."""

_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def lmms_generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with one meaning for all models.

    A temperature above 0 means sampling, whatever `do_sample` says; without, nothing of sampling counts. What no model
    knows says nothing: tasks carry options of one model's image preparation, say. Source:
    `lmms_eval/models/chat/huggingface.py` and `qwen2_5_vl.py` 0.7.3.
    """
    given = {key: option for key, option in options.items() if key in KNOWN_KEYS and option is not None}
    if not any(key in given for key in LENGTH_KEYS):
        given["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
    given["do_sample"] = float(given.get("temperature", 0)) > 0
    if not given["do_sample"]:
        return {key: option for key, option in given.items() if key not in _OF_SAMPLING}
    return given
