"""Where images stand in a prompt: lm-eval's placeholder in a task's text, to what a model reads there.

Source: lm-eval's `hf-multimodal` (`HFMultimodalLM.apply_chat_template`, `replace_placeholders`).
"""

from __future__ import annotations

from typing import Any

IMAGE_PLACEHOLDER = "<image>"
"""What tasks write where an image belongs."""

Part = dict[str, Any]
"""{"type": "text", "text"} or {"type": "image"} of a conversation's turn."""


def typed_content(text: str, *, interleave: bool, max_images: int) -> list[Part]:
    """A turn's text as a chat template takes it: images where they stand, or before all text; `max_images` of them."""
    parts = text.split(IMAGE_PLACEHOLDER)
    images = min(max_images, len(parts) - 1)
    if not interleave:
        return [*({"type": "image"} for _ in range(images)), {"type": "text", "text": "".join(parts)}]
    content: list[Part] = []
    for place, part in enumerate(parts):
        if part:
            content.append({"type": "text", "text": part})
        if place < images:
            content.append({"type": "image"})
    return content


def with_image_strings(text: str, image_string: str, max_images: int) -> str:
    """A prompt without a chat template: the model's own string for the first `max_images` placeholders."""
    return text.replace(IMAGE_PLACEHOLDER, image_string, max_images)


def first_images(content: list[Part], max_images: int) -> list[Part]:
    """A turn of typed parts with its first `max_images` images only."""
    kept: list[Part] = []
    images = 0
    for part in content:
        images += part["type"] == "image"
        if part["type"] != "image" or images <= max_images:
            kept.append(part)
    return kept
