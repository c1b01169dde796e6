"""Where media stand in a prompt: lm-eval's placeholders in a task's text, to what a model reads there.

Sources: lm-eval's `hf-multimodal` (`HFMultimodalLM.apply_chat_template`, `replace_placeholders`) for images, and its
`hf-audiolm-qwen` for sounds. A video is shown as so many images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
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

    def conversation(self, contents: Sequence[str | list[Part]]) -> list[list[Part]]:
        """The contents of a conversation's turns, text or typed parts, as a chat template takes them: with the first
        `max_images` images of the whole conversation only, and images for videos."""
        left = self.max_images
        turns: list[list[Part]] = []
        for content in contents:
            parts = self._pieces(content) if isinstance(content, str) else content
            kept: list[Part] = []
            for part in parts:
                if part["type"] == "video":
                    kept += [{"type": "image"}] * self.num_frames
                elif part["type"] != "image" or left > 0:
                    kept.append(part)
                left -= part["type"] == "image"
            turns.append(kept if self.interleave or not isinstance(content, str) else _text_last(kept))
        return turns

    def _pieces(self, text: str) -> list[Part]:
        placeholders = {PLACEHOLDERS[kind]: kind for kind in PLACEHOLDERS if kind in self.kinds}
        pieces = re.split("(" + "|".join(placeholders) + ")", text) if placeholders else [text]
        content: list[Part] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                content.append({"type": placeholders[piece]})
            elif piece:
                content.append({"type": "text", "text": piece})
        return content

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


def _text_last(content: list[Part]) -> list[Part]:
    texts = [part["text"] for part in content if part["type"] == "text"]
    return [*(part for part in content if part["type"] != "text"), {"type": "text", "text": "".join(texts)}]
