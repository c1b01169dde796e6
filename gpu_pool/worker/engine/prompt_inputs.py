# pyright: basic
"""What a processor makes of a prompt, and of several for one forward pass: tensors by the names that forward knows.

Some have a number for each token (`input_ids`, masks, types of tokens), or a row of them (which images it sees): these
are padded on the left. All others belong to images and sounds, one after the other, and are concatenated; where their
shapes do not allow that, as of images of several sizes in some families, prompts do not share a batch. So nothing is
ever padded but text, and a prompt is computed from the tensors that it would have alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from gpu_pool.worker.engine.media import MediaError

_OF_SOUNDS = ("feature", "input_features", "input_values")
"""Beginnings of the names of tensors with a number for each moment of a sound, as many as there may be tokens."""
_SEEN_IMAGES = "cross_attention_mask"
"""Which images and tiles each token sees [1, tokens, images, tiles], where they are no tokens themselves (Mllama)."""


@dataclass(frozen=True, eq=False)
class PromptInputs:
    """One prompt's tensors, on the CPU, each with a leading dimension of 1, or of images or sounds."""

    tensors: Mapping[str, torch.Tensor]
    filler: int
    """A token to pad it with: one of its own that stands for no image, so that what looks at which tokens a row
    contains finds the same whatever it is batched with."""
    text_before: int
    """Tokens before the first image or sound."""

    def __len__(self) -> int:
        return self.tensors["input_ids"].shape[1] if "input_ids" in self.tensors else 0

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def kind(self) -> Hashable:
        """Prompts of one kind can be computed together."""
        return tuple(
            (name, tensor.dtype, tensor.shape[2 if self.is_of_tokens(name) else 1 :])
            for name, tensor in sorted(self.tensors.items())
        )

    def is_of_tokens(self, name: str) -> bool:
        """Whether that tensor has a number, or a row of them, for each token."""
        if name == _SEEN_IMAGES:
            return True
        return self.tensors[name].shape == (1, len(self)) and not name.startswith(_OF_SOUNDS)

    def extended(self, tokens: Sequence[int]) -> PromptInputs:
        """The prompt with further tokens of text behind it."""
        more = {"input_ids": torch.tensor([tokens], dtype=torch.long), "attention_mask": torch.ones(1, len(tokens))}
        more |= seen_after(self.tensors, len(tokens))
        nothing = torch.zeros(1, len(tokens))
        longer = {
            name: torch.cat([tensor, more.get(name, nothing).to(tensor.dtype)], dim=1)
            for name, tensor in self.tensors.items()
            if self.is_of_tokens(name)
        }
        return replace(self, tensors={**self.tensors, **longer})

    def last(self, length: int) -> PromptInputs:
        """The prompt without what is more than `length` tokens at its beginning.

        Raises:
            MediaError: an image or a sound stands there.
        """
        excess = len(self) - length
        if excess <= 0:
            return self
        if excess > self.text_before:
            raise MediaError(
                f"the prompt has {len(self)} tokens, of which {length} fit, and what is shown at token "
                f"{self.text_before} cannot be cut; smaller or fewer images take fewer "
                "(max_pixels, image_max_side, num_frames)"
            )
        shorter = {name: self.tensors[name][:, excess:] for name in self.tensors if self.is_of_tokens(name)}
        return replace(self, tensors={**self.tensors, **shorter}, text_before=self.text_before - excess)


def seen_after(tensors: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """What `count` tokens of text behind a prompt, or each of several, need to be told beside themselves: they see the
    images that its last token sees. Empty for most models."""
    seen = tensors.get(_SEEN_IMAGES)
    return {} if seen is None else {_SEEN_IMAGES: seen[:, -1:].expand(-1, count, -1, -1)}


def collate(prompts: Sequence[PromptInputs], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Prompts of one kind as one batch on `device`, padded on the left; floating-point numbers as `dtype`."""
    width = max(map(len, prompts))
    batch: dict[str, torch.Tensor] = {}
    for name, first in prompts[0].tensors.items():
        if prompts[0].is_of_tokens(name):
            parts = [_pad_left(prompt, name, width) for prompt in prompts]
        else:
            parts = [prompt.tensors[name] for prompt in prompts]
        batch[name] = torch.cat(parts).to(device, dtype if first.is_floating_point() else None)
    return batch


def _pad_left(prompt: PromptInputs, name: str, width: int) -> torch.Tensor:
    filler = prompt.filler if name == "input_ids" else 0
    tensor = prompt.tensors[name]
    inner = (0, 0) * (tensor.ndim - 2)
    return torch.nn.functional.pad(tensor, (*inner, width - len(prompt), 0), value=filler)
