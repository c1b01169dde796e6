"""Placeholders of images, as lm-eval's `hf-multimodal` puts them in."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.utils import replace_placeholders

from gpu_pool.evaluator.typed_content import MediaPlaces, Part

TEXTS = ("no image", "<image>", "<image>what?", "a <image> b<image><image>\nc", "<image><image> <image>")


def sees(**options: Any) -> MediaPlaces:
    """Of a model that reads images."""
    return MediaPlaces(kinds={"text", "image", "video"}, **options)


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
        assert sees(interleave=interleave, max_images=max_images).conversation([text]) == [expected]


@pytest.mark.parametrize("max_images", [1, 2, 999])
@pytest.mark.parametrize("text", TEXTS)
def test_prompts_without_a_template(text: str, max_images: int) -> None:
    expected = replace_placeholders(text, "<image>", "<|pad|>", max_images)
    assert sees(max_images=max_images).with_strings(text, "<|pad|>", None) == expected


IMAGE: Part = {"type": "image"}
SOUND: Part = {"type": "audio"}


def test_a_video_is_shown_as_images() -> None:
    places = sees(num_frames=3, max_images=1)
    assert places.conversation(["<video>what?"]) == [[IMAGE, IMAGE, IMAGE, {"type": "text", "text": "what?"}]]
    assert places.conversation([[{"type": "video"}, IMAGE, IMAGE]]) == [[IMAGE] * 4]
    assert places.with_strings("a<video>b<image><image>", "#", None) == "a###b#<image>"


@pytest.mark.parametrize("interleave", [True, False])
def test_images_are_counted_over_all_turns(interleave: bool) -> None:
    turns: list[str | list[Part]] = ["<image>a", "b", [IMAGE, {"type": "text", "text": "c"}], "<image>d"]
    shown = sees(max_images=2, interleave=interleave).conversation(turns)
    assert [turn.count(IMAGE) for turn in shown] == [1, 0, 1, 0]


def test_what_a_model_does_not_take_is_text() -> None:
    assert sees().conversation(["<audio>what?"]) == [[{"type": "text", "text": "<audio>what?"}]]
    hears = MediaPlaces(kinds={"text", "audio"})
    assert hears.conversation(["a <audio><image>"]) == [
        [{"type": "text", "text": "a "}, SOUND, {"type": "text", "text": "<image>"}]
    ]
    assert hears.with_strings("a <audio><image>", None, "#") == "a #<image>"
    with pytest.raises(LookupError, match="audio"):
        hears.with_strings("a <audio>", None, None)
