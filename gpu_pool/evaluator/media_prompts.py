"""From lm-eval's instances with media to prompts for a worker: text with placeholders, and files by their digests."""

# pyright: basic
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance

from gpu_pool.chunk_messages import MediaPrompt
from gpu_pool.evaluator.api_prompts import TextPrompts
from gpu_pool.evaluator.images import ImageProblem, Video, described, image_file, shown_in
from gpu_pool.evaluator.media_files import MediaFiles
from gpu_pool.evaluator.prompts import PromptEncoder
from gpu_pool.evaluator.sounds import media_file
from gpu_pool.evaluator.tokenising import Tokens

FILE_COST = 256
"""Tokens that an image or a sound counts as: what a small one takes in most families of models."""
_KINDS = ("visual", "audio", "video")
_NOTHING: dict[str, Any] = {}


class Shown(NamedTuple):
    """An instance's prompt, and what is wrong with its media."""

    prompt: MediaPrompt
    problem: str | None


class MediaPrompts:
    """Makes the prompts of one job."""

    def __init__(self, files: MediaFiles, encoder: PromptEncoder | TextPrompts) -> None:
        """Files go into `files`."""
        self._files = files
        self._encoder = encoder

    def of(self, instances: Sequence[Instance], folders: Sequence[Path], *, is_chat: bool) -> list[Shown]:
        """Each instance's; relative paths are looked for in `folders`.

        `is_chat`: a chat template has placed the media in the text already.

        Raises:
            PromptError: nobody knows what stands for an image or a sound in the model's prompts.
        """
        known: dict[int, tuple[MediaPrompt, str | None]] = {}  # a document's choices show the same
        prompts: list[Shown] = []
        for instance in instances:
            text, _, *more = arguments(instance)
            shown = more[0] if more and shows_media(instance) else _NOTHING
            if id(shown) not in known:
                known[id(shown)] = self._keep_files(shown, folders)
            media, problem = known[id(shown)]
            placed = self._text(text, media, is_chat)
            prompt = MediaPrompt(text=placed, media=media.media, frames=media.frames, audio=media.audio)
            prompts.append(Shown(prompt, problem))
        return prompts

    def _text(self, text: str, media: MediaPrompt, is_chat: bool) -> str:
        if self._encoder.transcribes:
            return ""  # what such a model says is all of what it hears
        return text if is_chat else self._encoder.place_media(text)

    def _keep_files(self, shown: Mapping[str, Any], folders: Sequence[Path]) -> tuple[MediaPrompt, str | None]:
        """A prompt without its text."""
        seen: list[str] = []
        frames: list[int] = []
        try:
            images = list(shown_in(shown.get("visual", [])))
            videos = [Video(file) for file in shown_in(shown.get("video", []))]
            for visual in (*self._allowed(images), *videos):
                is_video = isinstance(visual, Video)
                seen.append(self._keep(visual.file, "video", folders) if is_video else self._image(visual, folders))
                frames.append(self._encoder.num_frames if is_video else 0)
            heard = [self._keep(file, "audio", folders) for file in shown_in(shown.get("audio", []))]
        except ImageProblem as problem:
            return MediaPrompt(text=""), str(problem)
        prompt = MediaPrompt(
            text="", media=tuple(seen), frames=tuple(frames) if any(frames) else (), audio=tuple(heard)
        )
        if self._encoder.transcribes and (len(heard) != 1 or seen):
            return prompt, f"the model hears one sound, and the document has {len(heard) or 'none'}"
        return prompt, None

    def _allowed(self, visuals: Sequence[Any]) -> list[Any]:
        """Without the images beyond `max_images`."""
        kept: list[Any] = []
        images = 0
        for visual in visuals:
            images += not isinstance(visual, Video)
            if isinstance(visual, Video) or images <= self._encoder.max_images:
                kept.append(visual)
        return kept

    def _image(self, image: Any, folders: Sequence[Path]) -> str:
        return self._files.add(image_file(image, folders))

    def _keep(self, shown: Any, kind: str, folders: Sequence[Path]) -> str:
        file = media_file(shown, kind, folders)
        return self._files.add_path(file) if isinstance(file, Path) else self._files.add(file)


def arguments(instance: Instance) -> tuple[Any, ...]:
    """(context, continuation or options), and {"visual": images, "audio": …, "video": …} where the task has some."""
    return instance.args


def shows_media(instance: Instance) -> bool:
    """Whether media are part of its prompt; a choice that is scored without its question shows none."""
    given = arguments(instance)
    asks = bool(given[0]) or instance.request_type == "generate_until"
    return asks and len(given) > 2 and any(kind in given[2] for kind in _KINDS)


def forget_media(instances: Sequence[Instance]) -> None:
    """Put a description in the place of each file, in documents and arguments: memory would not hold all of them."""
    with_media = [instance for instance in instances if len(arguments(instance)) > 2]
    documents = {id(instance.doc): instance.doc for instance in with_media}
    plain = {key: described(doc) for key, doc in documents.items()}
    for instance in with_media:
        instance.doc = plain[id(instance.doc)]
        *others, shown = arguments(instance)
        instance.arguments = (*others, described(shown))


def stand_in(prompt: MediaPrompt, text: Tokens) -> Tokens:
    """Tokens by which prompts with media are put in order and their cost is told: equal files side by side.

    Each file counts as FILE_COST tokens of its digest, a video for each of its frames, the text as its own.
    """
    frames = (*prompt.frames, *[0] * (len(prompt.files) - len(prompt.frames)))
    files = [
        np.resize(np.frombuffer(bytes.fromhex(digest), np.uint32), FILE_COST * max(1, count))
        for digest, count in zip(prompt.files, frames, strict=True)
    ]
    return np.concatenate([*files, text])
