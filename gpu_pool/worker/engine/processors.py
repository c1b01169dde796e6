# pyright: basic
"""Loads a checkpoint's processor: what it makes of images and sounds, its tokenizer, and how they are put together."""

from __future__ import annotations

import logging
from typing import Any

import transformers
from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    processor_class_from_name,
)

from gpu_pool.records import ModelArgs

_PIXELS = ("min_pixels", "max_pixels")

logger = logging.getLogger(__name__)


class NoProcessor(Exception):
    """The checkpoint's processor cannot be loaded."""


def load_processor(args: ModelArgs, model_type: str, *, trust_remote_code: bool) -> Any:
    """The processor, as lm-eval's `hf-multimodal` loads it.

    Where AutoProcessor refuses, because a part for video cannot be made without torchvision, it is put together from
    its other parts.

    Raises:
        NoProcessor: neither can be loaded, and why.
    """
    source = args.tokenizer or args.pretrained
    options: dict[str, Any] = {"revision": args.revision or "main", "trust_remote_code": trust_remote_code}
    if args.subfolder:
        options["subfolder"] = args.subfolder
    options |= {name: value for name in _PIXELS if (value := getattr(args, name))}
    try:
        processor = transformers.AutoProcessor.from_pretrained(source, **options)
    except Exception as error:  # transformers raises whatever its parts do
        return _load_halves(source, model_type, options, error)
    has_parts = any(hasattr(processor, name) for name in ("image_processor", "feature_extractor"))
    if not has_parts or not hasattr(processor, "tokenizer"):
        raise NoProcessor(f"{type(processor).__name__} of {source} does not put images or sounds and text together")
    return _without_pixels(processor)


def _load_halves(source: str, model_type: str, options: dict[str, Any], refusal: Exception) -> Any:
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    whole = processor_class_from_name(name) if name else None
    if whole is None:
        raise NoProcessor(f"{type(refusal).__name__}: {refusal}") from refusal
    halves = type(f"Halved{name}", (_Halves, whole), {"__init__": whole.__init__})
    try:
        processor = halves.from_pretrained(source, **options)
    except Exception as error:
        raise NoProcessor(f"{type(error).__name__}: {error}") from refusal
    logger.info("%s is put together without its other parts: %s", name, refusal)
    return _without_pixels(processor)


def _without_pixels(processor: Any) -> Any:
    """Pixel limits are the image processor's: the tokenizer was given them as well, and hands them to each call."""
    for name in _PIXELS:
        processor.tokenizer.init_kwargs.pop(name, None)
    return processor


class _Halves:
    """Lets a processor be made without its parts for video."""

    @classmethod
    def _get_arguments_from_pretrained(cls, source: str, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
        loaders: dict[str, Any] = {
            "image_processor": transformers.AutoImageProcessor,
            "feature_extractor": transformers.AutoFeatureExtractor,
            "tokenizer": transformers.AutoTokenizer,
        }
        names: list[str] = cls.get_attributes()  # pyright: ignore[reportAttributeAccessIssue]
        return [loaders[name].from_pretrained(source, **kwargs) if name in loaders else None for name in names]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is None:
            return None
        return super().check_argument_for_proper_class(  # pyright: ignore[reportAttributeAccessIssue]
            argument_name, argument
        )

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As most processors have it; some families' own asks the part for video, whatever is shown (SmolVLM)."""
        return transformers.ProcessorMixin.apply_chat_template(self, *args, **kwargs)  # pyright: ignore
