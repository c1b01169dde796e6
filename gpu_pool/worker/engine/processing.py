# pyright: basic
"""Prompts with media to what a model's forward takes: each decoded, processed and tokenised by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from gpu_pool.checkpoints import SPEECH_TYPES
from gpu_pool.chunk_messages import MediaFile, MediaPrompt
from gpu_pool.records import ModelArgs
from gpu_pool.sound import SoundError, decode_sound
from gpu_pool.worker.engine.media import LargestSize, MediaError, PixelLimits, decode_image
from gpu_pool.worker.engine.preparation import Files
from gpu_pool.worker.engine.prompt_inputs import PromptInputs
from gpu_pool.worker.engine.video import decode_frames

_FLAT = {"llava"}
"""Model types whose processors take the images of all prompts in one list (lm-eval's `hf-multimodal`)."""
_PLACEHOLDERS = tuple(f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index"))

_USUAL_WINDOW_SECONDS = 30
"""That feature extractors hear at once, where they do not say."""
_NEGLIGIBLE_SECONDS = 0.1
"""That may be cut off: encoders make a sound of 30 seconds a little longer."""


class PromptProcessor:
    """A checkpoint's processor, called as lm-eval's `hf-multimodal` calls it, for one prompt at a time."""

    def __init__(self, processor: Any, config: Any, args: ModelArgs, filler: int) -> None:
        """`filler` pads prompts that are nothing but images."""
        self.processor = processor
        self._transcribes = config.model_type in SPEECH_TYPES
        self._takes_flat = config.model_type in _FLAT
        images = getattr(processor, "image_processor", None)
        self._to_rgb = args.convert_img_format or not getattr(images, "do_convert_rgb", False)
        self._size = LargestSize(width=args.image_width, height=args.image_height, longest=args.image_max_side)
        limits = PixelLimits() if _knows_pixels(images) else PixelLimits(least=args.min_pixels, most=args.max_pixels)
        self._pixels = limits
        self._sounds: Any = getattr(processor, "feature_extractor", None)
        self._placeholders = {getattr(config, name, None) for name in _PLACEHOLDERS}
        self._filler = filler

    @property
    def sees(self) -> bool:
        """Whether images can be shown to it."""
        return getattr(self.processor, "image_processor", None) is not None

    @property
    def hears(self) -> bool:
        """Whether sounds can be played to it."""
        return self._sounds is not None

    def prepare(self, prompt: MediaPrompt, media: Files) -> PromptInputs:
        """The prompt's tensors; `media` are the files, by digest.

        Raises:
            MediaError: something cannot be shown, or the processor refuses the prompt.
        """
        sounds = [self._decode_sound(_content(media[digest])) for digest in prompt.audio]
        if self._transcribes:
            return self._prepare_sound(sounds)
        images = list(self._images(prompt, media))
        tensors = self._process(prompt.text, images, sounds)
        self._check_all_is_heard(prompt.text, images, sounds, tensors)
        is_text = [token not in self._placeholders for token in tensors["input_ids"][0].tolist()]
        last_text = max((place for place, text in enumerate(is_text) if text), default=None)
        filler = self._filler if last_text is None else int(tensors["input_ids"][0, last_text])
        return PromptInputs(tensors, filler, text_before=([*is_text, False]).index(False))

    def _process(self, text: str, images: list[Image.Image], sounds: list[Any]) -> dict[str, torch.Tensor]:
        nested: Any = (images if self._takes_flat else [images]) if images else None
        heard = {"audio": sounds, "sampling_rate": self._sounds.sampling_rate} if sounds and self._sounds else {}
        try:
            made = self.processor(text=[text], **_given(images=nested), **heard, return_tensors="pt")
        except Exception as error:  # processors raise whatever their parts do
            raise MediaError(f"the processor refuses the prompt: {type(error).__name__}: {error}") from error
        return {name: made[name] for name in made if isinstance(made[name], torch.Tensor) and name != "labels"}

    def _check_all_is_heard(
        self, text: str, images: list[Image.Image], sounds: list[Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Most processors cut a sound off, silently, where their window ends; some go on in further windows. So one
        that is longer is asked for once more, a little shorter: if that makes no difference, its end is not heard."""
        for place, sound in enumerate(sounds):
            rate = self._sounds.sampling_rate
            window = getattr(self._sounds, "n_samples", _USUAL_WINDOW_SECONDS * rate)
            end = int(_NEGLIGIBLE_SECONDS * rate)
            if len(sound) - end <= window:
                continue
            without_end = [*sounds[:place], sound[:-end], *sounds[place + 1 :]]
            if _are_same(tensors, self._process(text, images, without_end)):
                raise MediaError(
                    f"the sound is {len(sound) / rate:.1f} seconds long, and the model does not hear its end: "
                    f"it hears {window / rate:g} seconds at once"
                )

    def _prepare_sound(self, sounds: list[Any]) -> PromptInputs:
        """One that is longer than the model hears at once is not cut off: the model then goes on along it."""
        if len(sounds) != 1:
            raise MediaError(f"the model hears one sound, and the prompt has {len(sounds)}")
        extract = self._sounds
        options: dict[str, Any] = {"sampling_rate": extract.sampling_rate, "return_tensors": "pt"}
        if len(sounds[0]) > extract.n_samples:
            options |= {"truncation": False, "padding": "longest", "return_attention_mask": True}
        made = extract(sounds, **options)
        return PromptInputs({name: made[name] for name in made}, filler=0, text_before=0)

    def _images(self, prompt: MediaPrompt, media: Files) -> Iterator[Image.Image]:
        frames = prompt.frames or (0,) * len(prompt.media)
        for digest, count in zip(prompt.media, frames, strict=True):
            content = _content(media[digest])
            if count:
                yield from decode_frames(content, count, self._fit)
            else:
                yield self._fit(decode_image(content if isinstance(content, bytes) else _read(content)))

    def _fit(self, image: Image.Image) -> Image.Image:
        if self._to_rgb and image.mode != "RGB":
            image = image.convert("RGB")
        return self._pixels.fit(self._size.fit(image))

    def _decode_sound(self, content: bytes | str) -> Any:
        if self._sounds is None:
            raise MediaError("the model's processor takes no sounds")
        try:
            return decode_sound(content, self._sounds.sampling_rate).samples
        except SoundError as error:
            raise MediaError(str(error)) from error


def _knows_pixels(images: Any) -> bool:
    """Whether an image processor takes limits of pixels itself, and has been loaded with them."""
    options = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
    return "max_pixels" in options or hasattr(images, "max_pixels")


def _are_same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None: processors of sounds know no images."""
    return {name: value for name, value in options.items() if value is not None}


def _content(file: bytes | MediaFile) -> bytes | str:
    """What a file holds, or its path while it is the file that the evaluator has seen there.

    Raises:
        MediaError: it is another one, or gone.
    """
    if isinstance(file, bytes):
        return file
    try:
        status = os.stat(file.path)
    except OSError as error:
        raise MediaError(f"the file {file.path} cannot be read: {error.strerror}") from error
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
        raise MediaError(f"the file {file.path} has changed since the job began")
    return file.path


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
