"""From lm-eval's instances with images to prompts for a worker: text with placeholders, and files by their digests."""

# pyright: basic
from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance

from gpu_pool.chunk_messages import MediaPrompt
from gpu_pool.evaluator.api_prompts import TextPrompts
from gpu_pool.evaluator.images import ImageFiles, ImageProblem, described, image_file, images_in
from gpu_pool.evaluator.prompts import PromptEncoder
from gpu_pool.evaluator.tokenising import Tokens

IMAGE_COST = 256
"""Tokens that an image counts as: what a small one takes in most families of models."""


_NOTHING: dict[str, Any] = {"visual": ()}


class Shown(NamedTuple):
    """An instance's prompt, and what is wrong with its images."""

    prompt: MediaPrompt
    problem: str | None


class ImagePrompts:
    """Makes the prompts of one job."""

    def __init__(self, files: ImageFiles, encoder: PromptEncoder | TextPrompts) -> None:
        """Image files go into `files`."""
        self._files = files
        self._encoder = encoder

    def of(self, instances: Sequence[Instance], folders: Sequence[Path], *, is_chat: bool) -> list[Shown]:
        """Each instance's; relative paths of images are looked for in `folders`.

        `is_chat`: a chat template has placed the images in the text already.

        Raises:
            PromptError: nobody knows what stands for an image in the model's prompts.
        """
        known: dict[int, tuple[tuple[str, ...], str | None]] = {}  # a document's choices show the same
        prompts: list[Shown] = []
        for instance in instances:
            text, _, *more = arguments(instance)
            shown = more[0] if more and shows_images(instance) else _NOTHING
            if id(shown) not in known:
                known[id(shown)] = self._keep_files(shown["visual"], folders)
            digests, problem = known[id(shown)]
            placed = text if is_chat else self._encoder.place_images(text)
            prompts.append(Shown(MediaPrompt(text=placed, media=digests), problem))
        return prompts

    def _keep_files(self, visual: Any, folders: Sequence[Path]) -> tuple[tuple[str, ...], str | None]:
        images = itertools.islice(images_in(visual), self._encoder.max_images)
        try:
            return tuple(self._files.add(image_file(image, folders)) for image in images), None
        except ImageProblem as problem:
            return (), str(problem)


def arguments(instance: Instance) -> tuple[Any, ...]:
    """(context, continuation or options), and {"visual": images} where the task has images."""
    return instance.args


def shows_images(instance: Instance) -> bool:
    """Whether images are part of its prompt; what is asked without a context shows none."""
    given = arguments(instance)
    return len(given) > 2 and "visual" in given[2] and bool(given[0])


def forget_images(instances: Sequence[Instance]) -> None:
    """Put a description in the place of each image, in documents and arguments: memory would not hold all images."""
    with_images = [instance for instance in instances if len(arguments(instance)) > 2]
    documents = {id(instance.doc): instance.doc for instance in with_images}
    plain = {key: described(doc) for key, doc in documents.items()}
    for instance in with_images:
        instance.doc = plain[id(instance.doc)]
        *others, shown = arguments(instance)
        instance.arguments = (*others, described(shown))


def stand_in(prompt: MediaPrompt, text: Tokens) -> Tokens:
    """Tokens by which prompts with images are put in order and their cost is told: equal images side by side.

    Each image counts as IMAGE_COST tokens of its digest, the text as its own.
    """
    images = [np.resize(np.frombuffer(bytes.fromhex(digest), np.uint32), IMAGE_COST) for digest in prompt.media]
    return np.concatenate([*images, text])
