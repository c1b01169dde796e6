"""Where media stand in a prompt: lm-eval's placeholders in a task's text, to what a model reads there.

Sources: lm-eval's `hf-multimodal` (`HFMultimodalLM.apply_chat_template`, `replace_placeholders`) for images, and its
`hf-audiolm-qwen` for sounds. A video is shown as so many images.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from gpu_pool.records import Modality

PLACEHOLDERS: dict[Modality, str] = {"image": "<image>", "audio": "<audio>", "video": "<video>"}
"""What tasks write where one belongs."""

Part = dict[str, Any]
"""{"type": "text", "text"}, or {"type": "image"}, "audio" or "video", of a conversation's turn."""


@dataclass(frozen=True, kw_only=True)
class MediaPlaces:
    """How a model is shown media."""

    kinds: Set[Modality]
    """Those that it takes; other placeholders are text."""
    interleave: bool = True
    """Where they stand, or before all text."""
    max_images: int = 999
    num_frames: int = 8
    """Images of a video."""

    def typed(self, text: str) -> list[Part]:
        """A turn's text as a chat template takes it."""
        placeholders = {PLACEHOLDERS[kind]: kind for kind in PLACEHOLDERS if kind in self.kinds}
        pieces = re.split("(" + "|".join(placeholders) + ")", text) if placeholders else [text]
        content: list[Part] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                content.append({"type": placeholders[piece]})
            elif piece:
                content.append({"type": "text", "text": piece})
        content = self.shown(content)
        if self.interleave:
            return content
        texts = [part["text"] for part in content if part["type"] == "text"]
        return [*(part for part in content if part["type"] != "text"), {"type": "text", "text": "".join(texts)}]

    def shown(self, content: list[Part]) -> list[Part]:
        """A turn of typed parts with its first `max_images` images only, and images for videos."""
        kept: list[Part] = []
        images = 0
        for part in content:
            images += part["type"] == "image"
            if part["type"] == "video":
                kept += [{"type": "image"}] * self.num_frames
            elif part["type"] != "image" or images <= self.max_images:
                kept.append(part)
        return kept

    def with_strings(self, text: str, image_string: str | None, audio_string: str | None) -> str:
        """A prompt without a chat template: the model's own strings for its placeholders, for `max_images` images.

        Raises:
            LookupError: one of the strings that is needed is None; "image" or "audio".
        """
        strings: list[tuple[Modality, str | None, int]] = [
            ("image", image_string, self.max_images),
            ("video", image_string and image_string * self.num_frames, -1),
            ("audio", audio_string, -1),
        ]
        for kind, string, most in strings:
            if kind not in self.kinds or PLACEHOLDERS[kind] not in text:
                continue
            if string is None:
                raise LookupError("audio" if kind == "audio" else "image")
            text = text.replace(PLACEHOLDERS[kind], string, most)
        return text
