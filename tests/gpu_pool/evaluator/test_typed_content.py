"""Placeholders of images, as lm-eval's `hf-multimodal` puts them in."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.utils import replace_placeholders

from gpu_pool.evaluator.typed_content import typed_content, with_image_strings

TEXTS = ("no image", "<image>", "<image>what?", "a <image> b<image><image>\nc", "<image><image> <image>")


class Rendered(HFMultimodalLM):
    """lm-eval's class without a model: its processor gives back what it is given."""

    def __init__(self, interleave: bool, max_images: int) -> None:
        self.interleave, self.max_images, self.processor = interleave, max_images, self

    def apply_chat_template(self, chat_history: Any, **_: Any) -> Any:
        return chat_history


@pytest.mark.parametrize("max_images", [1, 2, 999])
@pytest.mark.parametrize("text", TEXTS)
def test_turns_are_typed_alike(text: str, max_images: int) -> None:
    for interleave in (True, False):
        history = [{"role": "user", "content": text}]
        HFMultimodalLM.apply_chat_template(Rendered(interleave, max_images), history)
        expected = [{key: value for key, value in part.items() if key != "image"} for part in history[0]["content"]]
        assert typed_content(text, interleave=interleave, max_images=max_images) == expected


@pytest.mark.parametrize("max_images", [1, 2, 999])
@pytest.mark.parametrize("text", TEXTS)
def test_prompts_without_a_template(text: str, max_images: int) -> None:
    expected = replace_placeholders(text, "<image>", "<|pad|>", max_images)
    assert with_image_strings(text, "<|pad|>", max_images) == expected
