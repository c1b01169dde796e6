"""What lmms-eval's tasks show and say, as prompts: conversations (`doc_to_messages`), or a text and its pictures
(`doc_to_visual`).

Sources: `lmms_eval/protocol.py` for messages; for texts how its simple models, llava for one, place images: where the
text has placeholders, else before all of it.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.images import ImageProblem, UndecodedImage
from gpu_pool.evaluator.typed_content import IMAGE_PLACEHOLDER

Turn = dict[str, Any]
Prompt = tuple[str, list[Any]]
"""A text, and the images that it shows in turn."""

_VERBS = {"video": "watches", "audio": "hears"}


class UnservedModality(PoolError):
    """A document shows or sounds something that no model here can take."""


def chat_prompt(
    messages: Iterable[Turn],
    chat_template: Callable[..., str],
    *,
    reads_images: bool,
    system_instruction: str | None = None,
) -> Prompt:
    """A conversation by a chat template.

    Raises:
        UnservedModality: it has video or audio, or images for a model that reads text only.
    """
    turns: list[Turn] = [{"role": "system", "content": system_instruction}] if system_instruction else []
    images: list[Any] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        typed = [_typed(part, images) for part in parts]
        if not reads_images:
            _refuse(images)
        text = "".join(part["text"] for part in typed) if not reads_images else None
        turns.append({"role": message["role"], "content": typed if text is None else text})
    return chat_template(turns), images


def text_prompt(
    context: str,
    visuals: Any,
    chat_template: Callable[..., str] | None,
    *,
    reads_images: bool,
) -> Prompt:
    """A text and what `doc_to_visual` gives; a chat template makes it the user's turn.

    Raises:
        UnservedModality: as of `chat_prompt`.
    """
    shown = visuals if isinstance(visuals, list | tuple) else [] if visuals is None else [visuals]
    images: list[Any] = []
    for visual in shown:
        _typed(_part(visual), images)
    if not reads_images:
        _refuse(images)
    text = context
    if images and IMAGE_PLACEHOLDER not in context:
        text = IMAGE_PLACEHOLDER * len(images) + context
    return (text if chat_template is None else chat_template([{"role": "user", "content": text}])), images


def _part(visual: Any) -> dict[str, Any]:
    """A visual as a part of a message."""
    if isinstance(visual, UndecodedImage | ImageProblem | bytes):
        return {"type": "image", "url": visual}
    try:
        return ConfigurableMessagesTask._visual_to_content(visual)
    except TypeError:
        raise UnservedModality(f"doc_to_visual gives {type(visual).__name__}, which is no image here") from None


def _typed(part: dict[str, Any], images: list[Any]) -> dict[str, Any]:
    """A part as chat templates take it; an image goes into `images`."""
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        image = part.get("url", part.get("image", part.get("image_url")))
        inner = image.get("url") if isinstance(image, dict) and not isinstance(image, UndecodedImage) else None
        images.append(image if inner is None else inner)
        return {"type": "image"}
    raise UnservedModality(f"a document needs a model that {_VERBS.get(kind, 'takes')} {kind}; that is not served yet")


def _refuse(images: list[Any]) -> None:
    if images:
        raise UnservedModality("its documents show images, and the model reads text only")
