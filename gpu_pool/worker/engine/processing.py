# pyright: basic
"""Prompts with images to what a model's forward takes: each decoded, processed and tokenised by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gpu_pool.chunk_messages import MediaPrompt
from gpu_pool.records import ModelArgs
from gpu_pool.worker.engine.media import LargestSize, MediaError, decode_image
from gpu_pool.worker.engine.prompt_inputs import PromptInputs

_FLAT = {"llava"}
"""Model types whose processors take the images of all prompts in one list (lm-eval's `hf-multimodal`)."""


class PromptProcessor:
    """A checkpoint's processor, called as lm-eval's `hf-multimodal` calls it, for one prompt at a time."""

    def __init__(self, processor: Any, config: Any, args: ModelArgs, filler: int) -> None:
        """`filler` pads prompts that are nothing but images."""
        self.processor = processor
        self._takes_flat = config.model_type in _FLAT
        self._to_rgb = args.convert_img_format or not getattr(processor.image_processor, "do_convert_rgb", False)
        self._size = LargestSize(width=args.image_width, height=args.image_height, longest=args.image_max_side)
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        self._placeholders = {getattr(config, name, None) for name in names}
        self._filler = filler

    def prepare(self, prompt: MediaPrompt, media: Mapping[str, bytes]) -> PromptInputs:
        """The prompt's tensors; `media` are the files, by digest.

        Raises:
            MediaError: an image cannot be shown, or the processor refuses the prompt.
        """
        images = [self._decode(media[digest]) for digest in prompt.media]
        nested: Any = (images if self._takes_flat else [images]) if images else None
        try:
            made = self.processor(text=[prompt.text], images=nested, return_tensors="pt")
        except Exception as error:  # processors raise whatever their parts do
            raise MediaError(f"the processor refuses the prompt: {type(error).__name__}: {error}") from error
        tensors = {name: made[name] for name in made if isinstance(made[name], torch.Tensor) and name != "labels"}
        is_text = [token not in self._placeholders for token in tensors["input_ids"][0].tolist()]
        last_text = max((place for place, text in enumerate(is_text) if text), default=None)
        filler = self._filler if last_text is None else int(tensors["input_ids"][0, last_text])
        return PromptInputs(tensors, filler, text_before=([*is_text, False]).index(False))

    def _decode(self, data: bytes) -> Any:
        image = decode_image(data)
        if self._to_rgb and image.mode != "RGB":
            image = image.convert("RGB")
        return self._size.fit(image)
