"""Prompts with images as the engine is asked them, and what the model says of each by a plain forward pass."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from gpu_pool.chunk_messages import (
    GenerationOptions,
    MediaGenerationChunk,
    MediaLoglikelihoodChunk,
    MediaPrompt,
)
from gpu_pool.token_sequences import TokenSequences
from gpu_pool.worker.engine import multimodal_generation, multimodal_scoring
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.media_chunks import MediaChunk
from gpu_pool.worker.engine.preparation import Preparation

Continuation = tuple[int, ...]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of random pixels."""
    return Image.frombytes("RGB", (width, height), hashlib.shake_256(bytes([seed])).digest(3 * width * height))


def png(image: Image.Image) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Asked:
    """Conversations with images, rendered by the model's own chat template."""

    loaded: LoadedModel
    prompts: tuple[MediaPrompt, ...]
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, loaded: LoadedModel, *contents: Sequence[str | Image.Image]) -> Asked:
        """A user's turn each."""
        assert loaded.processor is not None
        files: dict[str, bytes] = {}
        prompts: list[MediaPrompt] = []
        for content in contents:
            parts: list[dict[str, Any]] = []
            digests: list[str] = []
            for part in content:
                if isinstance(part, str):
                    parts.append({"type": "text", "text": part})
                    continue
                data = png(part)
                digests.append(hashlib.sha256(data).hexdigest())
                files[digests[-1]] = data
                parts.append({"type": "image"})
            turn = [{"role": "user", "content": parts}]
            text = loaded.processor.processor.apply_chat_template(turn, add_generation_prompt=True)
            prompts.append(MediaPrompt(text=text, media=tuple(digests)))
        return cls(loaded, tuple(prompts), files)

    @property
    def placeholders(self) -> list[int]:
        """Tokens that stand for images: where a random model writes one, a forward pass over it looks for its image."""
        config = self.loaded.model.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        return [token for token in ids if token is not None]

    def generate(self, batch_size: int | None = None, **options: Any) -> tuple[dict[int, str], dict[int, str]]:
        """Texts and errors, by the numbers of the prompts."""
        suppressed = {"kwargs": {"suppress_tokens": self.placeholders}}
        chosen = GenerationOptions(**({"max_gen_toks": 8} | suppressed | options))
        chunk = MediaGenerationChunk(chunk_id=1, prompts=self.prompts, options=chosen, batch_size=batch_size)
        return multimodal_generation.generate(self.loaded, self._planned(chunk), lambda: False)

    def score(
        self, continuations: Sequence[Continuation], batch_size: int | None = None
    ) -> tuple[dict[int, tuple[float, bool]], dict[int, str]]:
        """Answers and errors of every continuation after every prompt, prompt by prompt."""
        chunk = MediaLoglikelihoodChunk(
            chunk_id=1,
            prompts=self.prompts,
            continuations=TokenSequences.pack(list(continuations) * len(self.prompts)),
            prompt_of=tuple(number for number in range(len(self.prompts)) for _ in continuations),
            batch_size=batch_size,
        )
        return multimodal_scoring.score(self.loaded, self._planned(chunk), lambda: False)

    def _planned(self, chunk: MediaGenerationChunk | MediaLoglikelihoodChunk) -> MediaChunk:
        return MediaChunk(chunk, Preparation(self.loaded.prepare).plan(chunk.prompts, self.files))

    def inputs(self, number: int) -> dict[str, torch.Tensor]:
        """What the model's processor makes of one prompt."""
        prompt = self.prompts[number]
        images = [Image.open(io.BytesIO(self.files[digest])) for digest in prompt.media]
        assert self.loaded.processor is not None
        nested = images if self.loaded.model.config.model_type == "llava" else [images]
        made = self.loaded.processor.processor(
            text=[prompt.text], images=nested if images else None, return_tensors="pt"
        )
        return {name: made[name] for name in made if name != "labels"}

    @torch.inference_mode()
    def plain_text(self, number: int, count: int = 8) -> str:
        """What is generated greedily, by a forward pass over everything for each token."""
        ends = self.loaded.model.generation_config.eos_token_id
        tokens: list[int] = []
        while len(tokens) < count:
            logits = self._logits(number, tokens)[-1]
            logits[self.placeholders] = -torch.inf
            token = int(logits.argmax())
            tokens.append(token)
            if token in (ends if isinstance(ends, list) else [ends]):
                break
        return self.loaded.tokenizer.decode(tokens, skip_special_tokens=True)

    @torch.inference_mode()
    def plain_score(self, number: int, continuation: Continuation, **values: int) -> float:
        """The log-probability of a continuation, by a forward pass over prompt and continuation.

        `values` are those of its tokens in tensors that say something of each token; 0 in others.
        """
        logits = self._logits(number, continuation, **values)[-len(continuation) - 1 : -1].log_softmax(-1)
        return sum(float(row[token]) for row, token in zip(logits, continuation, strict=True))

    def _logits(self, number: int, more: Sequence[int], **of_more: int) -> torch.Tensor:
        inputs = self.inputs(number)
        shape = inputs["input_ids"].shape
        for name, tensor in inputs.items():
            if tensor.shape == shape and more:
                values = {"input_ids": list(more), "attention_mask": [1] * len(more)}
                added = torch.tensor([values.get(name, [of_more.get(name, 0)] * len(more))], dtype=tensor.dtype)
                inputs[name] = torch.cat([tensor, added], dim=1)
            if name == "cross_attention_mask":  # what is written sees what the prompt's end sees
                inputs[name] = torch.cat([tensor, *[tensor[:, -1:]] * len(more)], dim=1)
        return self.loaded.model(**inputs).logits[0]
