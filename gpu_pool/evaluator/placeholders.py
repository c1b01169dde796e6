"""What a family's processor looks for where an image belongs, told without its files of images.

Most look for the token that their config names, as lm-eval takes it. Where a tokenizer knows a token that begins an
image, too, it may be that one (Gemma 3) or not (Gemma 3n, Janus, Chameleon): the processor's own code says which.
"""

# pyright: basic
from __future__ import annotations

import inspect
from typing import Any

from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    processor_class_from_name,
)


def image_placeholder(model_type: str, tokenizer: Any) -> str | None:
    """The string that a processor of this family replaces by an image; None: it says so only with its other parts."""
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    whole = processor_class_from_name(name) if isinstance(name, str) else None
    if whole is None:
        return None
    bare = type(f"Bare{name}", (_Bare, whole), {"__init__": whole.__init__})
    needed = inspect.signature(whole.__init__).parameters.values()
    parts = {part.name: None for part in list(needed)[1:] if part.default is part.empty and part.kind not in _SEVERAL}
    try:
        processor = bare(**parts | {"tokenizer": tokenizer})
    except Exception:  # it asks a part that it does not have here; whatever that raises
        return None
    return getattr(processor, "image_token", None)


_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class _Bare:
    """Lets a processor be made of its tokenizer alone."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument is None:
            return None
        return super().check_argument_for_proper_class(  # pyright: ignore[reportAttributeAccessIssue]
            argument_name, argument
        )
