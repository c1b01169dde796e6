"""Prompts for models behind endpoints: conversations as JSON, or text; tokens where a tokenizer is known here.

What a chat endpoint is asked is the conversation itself: its template is the endpoint's. Source: lm-eval's
`TemplateAPI` (`lm_eval/models/api_models.py` 0.4.13), which asks it so, too.
"""

# pyright: basic
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from transformers import PreTrainedConfig

from gpu_pool.endpoints import taken_by
from gpu_pool.evaluator.prompts import PromptEncoder, PromptError
from gpu_pool.evaluator.tokenising import Tokens
from gpu_pool.evaluator.typed_content import PLACEHOLDERS, MediaPlaces
from gpu_pool.records import Modality, ModelSpec

_NO_SCORES = "it asks for log-likelihoods, which this endpoint gives none of"
_UNLIMITED = 1 << 30
"""Tokens of prompts that the endpoint, and nobody here, knows the limit of."""


class TextPrompts:
    """Of a model that is sent text. Its questions' tokens are their bytes: they put questions in order, no more."""

    sends_text = True
    transcribes = False
    num_frames = 0
    """It is shown no videos."""
    is_encoder_decoder = False
    end_of_text = None
    prefix_token_id = 0
    max_length = _UNLIMITED

    def __init__(self, model: ModelSpec) -> None:
        assert model.api is not None
        self._is_chat = model.api.kind == "chat"
        self._args = model.args
        self.modalities: frozenset[Modality] = taken_by(model.api)
        self.has_chat_template = self._is_chat
        self.max_images = model.args.max_images
        self._places = MediaPlaces(
            kinds=self.modalities,
            interleave=model.args.interleave,
            max_images=model.args.max_images,
        )

    def encode(self, strings: Iterable[str]) -> dict[str, Tokens]:
        """What stands for each distinct string."""
        return {text: _bytes(text) for text in strings}

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """Raises PromptError: nothing is scored without tokens."""
        raise PromptError(_NO_SCORES)

    def why_unscorable(self, context: Tokens, continuation: Tokens) -> str:
        """Of any pair."""
        return _NO_SCORES

    def seen_context(self, context: Tokens, continuation: Tokens) -> Tokens:
        """All of it, as far as anybody knows here."""
        return context

    def encode_prompts(self, prompts: Iterable[str], room: int) -> dict[str, Tokens]:
        """As `encode`: the endpoint knows how long prompts may be."""
        return self.encode(prompts)

    def chat_template(self, wanted: bool | str | None) -> str | None:
        """It is the endpoint's."""
        return None

    def apply_chat_template(
        self,
        wanted: bool | str,
        history: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        *,
        keep_system: bool = False,
    ) -> str:
        """One conversation in JSON, images as {"type": "image"} where they belong; system turns are always kept.

        Raises:
            PromptError: the endpoint takes no conversations.
        """
        if not self._is_chat:
            raise PromptError("apply_chat_template needs a chat endpoint, or a tokenizer with a chat template")
        contents = [turn["content"] for turn in history]
        shown = [
            given if isinstance(given, str) and PLACEHOLDERS["image"] not in given else parts
            for given, parts in zip(contents, self._places.conversation(contents), strict=True)
        ]
        return json.dumps([{**turn, "content": content} for turn, content in zip(history, shown, strict=True)])

    def place_media(self, prompt: str) -> str:
        """A prompt without a chat template: what the user says."""
        return self.apply_chat_template(True, [{"role": "user", "content": prompt}]) if self._is_chat else prompt

    def description(self) -> dict[str, Any]:
        """Nothing is known of its tokens."""
        return {}


def api_prompts(model: ModelSpec) -> TextPrompts | PromptEncoder:
    """What makes the prompts of a model behind an endpoint: tokens where its tokenizer is here, or else text."""
    args = model.args
    if args.tokenizer is None:
        return TextPrompts(model)
    args = msgspec.structs.replace(args, pretrained=args.tokenizer, max_length=args.max_length or _UNLIMITED)
    return PromptEncoder(args, PreTrainedConfig())


def _bytes(text: str) -> Tokens:
    return np.frombuffer(text.encode(errors="surrogatepass"), np.uint8).astype(np.uint32)
