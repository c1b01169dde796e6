# pyright: basic
"""Where a generated text ends: stop strings while it is generated, and what is left of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from gpu_pool.worker.engine.cancellation import Cancelled

_LOOKBACK_MARGIN = 2
"""Tokens looked at beyond a stop string's own: a model may write it in other tokens than the tokenizer would."""


def stop_strings(until: Sequence[str], tokenizer: Any) -> list[str]:
    """`until`, and the text of the end-of-sequence token (lm-eval's `handle_stop_sequences`)."""
    if tokenizer.eos_token_id is None:
        return list(until)
    eos = tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=False)
    return list(until) if eos in until else [*until, eos]


class StopFinder:
    """Looks for stop strings in the text of a row's last tokens."""

    def __init__(self, tokenizer: Any, until: Sequence[str]) -> None:
        self.strings = stop_strings(until, tokenizer)
        self._tokenizer = tokenizer
        self._lookbacks = {
            stop: len(tokenizer.encode(stop, add_special_tokens=False)) + _LOOKBACK_MARGIN for stop in self.strings
        }
        """Tokens that may hold each stop string (lm-eval's `MultiTokenEOSCriteria`)."""
        self.lookback = max(self._lookbacks.values(), default=_LOOKBACK_MARGIN)
        """Tokens of a row that may hold a stop string which its last one completes."""

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string stands in as many of a row's last new `tokens` as it may take."""
        text = self._tokenizer.decode(tokens[-self.lookback :])
        return any(  # mostly none is in the longest text, and then in no shorter one
            stop in text and (lookback == self.lookback or stop in self._tokenizer.decode(tokens[-lookback:]))
            for stop, lookback in self._lookbacks.items()
        )


class StopAtStrings(transformers.StoppingCriteria):
    """Ends a row once the text of its last tokens contains a stop string, and everything once it is cancelled."""

    def __init__(
        self, tokenizer: Any, until: list[str], shape: tuple[int, int], should_stop: Callable[[], bool]
    ) -> None:
        """`shape` is that of the padded prompts: (rows, width)."""
        self._finder = StopFinder(tokenizer, until)
        self._rows, self._width = shape
        self._should_stop = should_stop
        self.lengths: list[int | None] = [None] * self._rows
        """New tokens of each row up to its stop string; None while it has none."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each of `input_ids` [rows * beams, length] is done; a prompt's first beam decides for its beams.

        Raises:
            Cancelled: nobody waits for these rows any more.
        """
        if self._should_stop():
            raise Cancelled
        beams = input_ids.shape[0] // self._rows
        generated = input_ids[::beams, self._width :]
        for row, tail in enumerate(generated[:, -self._finder.lookback :].tolist()):
            if self.lengths[row] is None and self._finder.ends(tail):
                self.lengths[row] = generated.shape[1]
        done = torch.tensor([length is not None for length in self.lengths], device=input_ids.device)
        return done.repeat_interleave(beams)


def finish_text(tokens: list[int], tokenizer: Any, until: Sequence[str], think_end_token: str | int | None) -> str:
    """The answer in generated `tokens`: after the thinking, without special tokens, before the first stop string."""
    if isinstance(think_end_token, int) and think_end_token in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(think_end_token) :]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if isinstance(think_end_token, int):
        text = text.lstrip()
    elif think_end_token:
        text = text.split(think_end_token)[-1].lstrip()
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text
