from __future__ import annotations

from typing import Any

import pytest

from gpu_pool.evaluator.lmms_options import DEFAULT_MAX_NEW_TOKENS, lmms_generation


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({}, {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "do_sample": False}),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 0, "do_sample": True}, {"do_sample": False}),
        ({"max_new_tokens": 16, "image_aspect_ratio": "original", "until": ["\n"]}, {"until": ["\n"]}),
        (
            {"max_new_tokens": 16, "temperature": 0.2, "top_p": 0.9},
            {"temperature": 0.2, "top_p": 0.9, "do_sample": True},
        ),
        ({"max_gen_toks": 8, "num_beams": None}, {"max_gen_toks": 8}),
    ],
)
def test_options_are_read_as_lmms_evals_models_read_them(options: dict[str, Any], meant: dict[str, Any]) -> None:
    length = {"max_new_tokens": 16} if "max_new_tokens" in options else {}
    assert lmms_generation(options) == {"do_sample": False, **length, **meant}
