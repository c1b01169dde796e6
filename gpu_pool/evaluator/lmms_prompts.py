"""What lmms-eval's tasks show and say, as prompts: conversations (`doc_to_messages`), or a text and its pictures
(`doc_to_visual`).

Sources: `lmms_eval/protocol.py` for messages; for texts how its simple models, llava for one, place images: where the
text has placeholders, else before all of it.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.images import ImageProblem, UndecodedImage, Video
from gpu_pool.evaluator.typed_content import PLACEHOLDERS
from gpu_pool.records import TEXT_ONLY, Modality

Turn = dict[str, Any]
Media = dict[str, list[Any]]
"""{"visual": images and Videos, "audio": sounds}, in turn; what there is none of is left out."""
Prompt = tuple[str, Media]
"""A text, and what it shows."""

_KINDS: dict[str, Modality] = {"image": "image", "image_url": "image", "video": "video", "audio": "audio"}
"""Of parts of messages."""
_KEYS: dict[Modality, str] = {"image": "visual", "video": "visual", "audio": "audio"}


class UnservedModality(PoolError):
    """A document shows or sounds something that no model here can take."""


def chat_prompt(
    messages: Iterable[Turn],
    chat_template: Callable[..., str],
    *,
    modalities: Set[Modality],
    system_instruction: str | None = None,
) -> Prompt:
    """A conversation by a chat template; a `system_instruction` takes the place of the task's own system turn.

    Raises:
        UnservedModality: it shows what the model, which takes `modalities`, does not take.
    """
    turns: list[Turn] = [{"role": "system", "content": system_instruction}] if system_instruction else []
    media: Media = {}
    for place, message in enumerate(messages):
        if system_instruction and place == 0 and message["role"] == "system":
            continue
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        typed = [_typed(part, media, modalities) for part in parts]
        text = "".join(part["text"] for part in typed) if modalities == TEXT_ONLY else None
        turns.append({"role": message["role"], "content": typed if text is None else text})
    return chat_template(turns), media


def text_prompt(
    context: str,
    visuals: Any,
    chat_template: Callable[..., str] | None,
    *,
    modalities: Set[Modality],
) -> Prompt:
    """A text and what `doc_to_visual` gives; a chat template makes it the user's turn.

    Raises:
        UnservedModality: as of `chat_prompt`.
    """
    shown = visuals if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
    media: Media = {}
    kinds = [_typed(_part(visual, modalities), media, modalities)["type"] for visual in shown]
    missing = [PLACEHOLDERS[kind] for kind in kinds if PLACEHOLDERS[kind] not in context]
    text = "".join(missing) + context
    return (text if chat_template is None else chat_template([{"role": "user", "content": text}])), media


def _part(visual: Any, modalities: Set[Modality]) -> dict[str, Any]:
    """A visual as a part of a message."""
    if isinstance(visual, ImageProblem):
        return {"type": "image" if "image" in modalities else "audio", "url": visual}
    if isinstance(visual, UndecodedImage | bytes):
        return {"type": "image", "url": visual}
    try:
        return ConfigurableMessagesTask._visual_to_content(visual)
    except TypeError:
        raise UnservedModality(f"doc_to_visual gives {type(visual).__name__}, which is no image here") from None


def _typed(part: dict[str, Any], media: Media, modalities: Set[Modality]) -> dict[str, Any]:
    """A part as chat templates take it; what it shows goes into `media`."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    kind = _KINDS.get(part["type"])
    if kind is None or kind not in modalities:
        taken = ", ".join(sorted(modalities))
        raise UnservedModality(f"its documents show {part['type']}, and the model takes {taken}")
    shown = part.get("url", part.get(kind, part.get(part["type"])))
    if kind == "image" and isinstance(shown, dict) and not isinstance(shown, UndecodedImage):
        shown = shown.get("url", shown)
    if kind == "video" and isinstance(shown, dict) and {"video_start", "video_end"} & shown.keys():
        raise UnservedModality("its documents show parts of videos, which are not served")
    media.setdefault(_KEYS[kind], []).append(Video(shown) if kind == "video" else shown)
    return {"type": kind}
