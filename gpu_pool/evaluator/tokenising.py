"""Strings to tokens, each distinct part of them once.

Prompts repeat: few-shot examples in every document, the question before each of its choices. Where the tokenizer allows
it (`cuts`), texts are cut at line ends, each distinct line is tokenised once, and an addition to a text costs no more
than the text's last word. A sample of each call is compared with what the tokenizer makes of whole strings; should it
ever differ, texts stay whole from then on.
"""

# pyright: basic
from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.models.utils import has_bos_prefix
from numpy.typing import NDArray
from transformers import TokenizersBackend

from gpu_pool.evaluator import cuts

Tokens = NDArray[np.uint32]
"""Token ids, shape [length]. Never written to: contexts and continuations may be views of one array."""

NO_TOKENS: Tokens = np.empty(0, np.uint32)

_BATCH = 1024  # strings per tokenizer call: enough for its overhead, little enough for memory
_CHECKED = 4  # strings of each call that are tokenised whole too

_log = logging.getLogger(__name__)


class Tokeniser:
    """A transformers tokenizer, and whether texts may be cut for it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        obstacle = _obstacle(tokenizer)
        self.cuts_texts = obstacle is None
        if obstacle:
            _log.info("Prompts are tokenised whole: this tokenizer does not allow to cut them (%s)", obstacle)

    def whole(self, strings: Iterable[str], options: dict[str, Any]) -> dict[str, Tokens]:
        """What the tokenizer, called with `options`, makes of each distinct string."""
        tokens: dict[str, Tokens] = {}
        distinct = list(dict.fromkeys(strings))
        for start in range(0, len(distinct), _BATCH):
            batch = distinct[start : start + _BATCH]
            encoded = self.tokenizer(batch, return_attention_mask=False, **options)["input_ids"]
            tokens.update((string, np.array(ids, np.uint32)) for string, ids in zip(batch, encoded, strict=True))
        return tokens

    def distrust(self) -> None:
        """Cut no text any more."""
        self.cuts_texts = False
        _log.warning("Prompts are tokenised whole from now on: parts of one gave other tokens")


class TextEncoder:
    """One way of calling a tokenizer: which special tokens a text gets before it."""

    def __init__(self, tokeniser: Tokeniser, options: dict[str, Any], bos: str | None = None) -> None:
        """`options` of the tokenizer's call; a text that begins with `bos` gets no special tokens."""
        self._tokeniser = tokeniser
        self._may_cut = not options.get("truncation")
        self._options = options
        self._bare = options | {"add_special_tokens": False}
        self._bos = bos

    def encode(self, texts: Iterable[str]) -> dict[str, Tokens]:
        """Tokens of each distinct text."""
        distinct = list(dict.fromkeys(texts))
        return self._checked(distinct, self._encode_cut, self._encode_whole)

    def extend(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], tuple[Tokens, Tokens]]:
        """For each distinct (text, addition): tokens of the text, and those of both together beyond that many."""
        distinct = list(dict.fromkeys(pairs))
        return self._checked(distinct, self._extend_cut, self._extend_whole)

    def _checked(self, items: Sequence[Any], cut: Callable[..., Any], whole: Callable[..., Any]) -> Any:
        """`cut` of the items where a sample of them has the same tokens as by `whole`, `whole` otherwise."""
        if not (self._tokeniser.cuts_texts and self._may_cut and items):
            return whole(items)
        found = cut(items)
        sample = items[:: -(-len(items) // _CHECKED)]
        if all(_equal(found[item], expected) for item, expected in whole(sample).items()):
            return found
        self._tokeniser.distrust()
        return whole(items)

    # ------------------------------------------------------------ whole texts

    def _encode_whole(self, texts: Sequence[str]) -> dict[str, Tokens]:
        tokens = self._tokeniser.whole((text for text in texts if self._is_complete(text)), self._bare)
        return tokens | self._tokeniser.whole((text for text in texts if text not in tokens), self._options)

    def _extend_whole(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[Tokens, Tokens]]:
        tokens = self._encode_whole([text for text, more in pairs for text in (text, text + more)])
        return {(text, more): (tokens[text], tokens[text + more][len(tokens[text]) :]) for text, more in pairs}

    def _is_complete(self, text: str) -> bool:
        return has_bos_prefix(text, self._bos)

    # ------------------------------------------------------------ cut texts

    def _encode_cut(self, texts: Sequence[str]) -> dict[str, Tokens]:
        parts = {text: cuts.lines(text) for text in texts}
        tokens = self._parts(itertools.chain.from_iterable(parts.values()))
        before = self._before()
        return {text: _join(before(text), parts[text], tokens) for text in texts}

    def _extend_cut(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[Tokens, Tokens]]:
        texts: dict[str, list[str]] = {}
        for text, _ in pairs:
            if text not in texts:
                *begin, last = cuts.lines(text)
                texts[text] = [*begin, *cuts.before_last_word(last)]
        ends = dict.fromkeys(
            (texts[text][-1], more) for text, more in pairs
        )  # the same "Answer:", " A" again and again
        extended = {(word, more): cuts.lines(word + more) for word, more in ends}
        tokens = self._parts(itertools.chain(*texts.values(), *extended.values()))
        before = self._before()
        contexts = {text: _join(before(text), parts, tokens) for text, parts in texts.items()}
        additions = {
            (word, more): _join(NO_TOKENS, parts, tokens)[len(tokens[word]) :].copy()
            for (word, more), parts in extended.items()
        }
        found = {(text, more): (contexts[text], additions[texts[text][-1], more]) for text, more in pairs}
        grown = [(text, more) for text, more in pairs if before(text) is not before(text + more)]
        return found | self._extend_whole(grown)  # a text that begins with BOS only together with its addition

    def _parts(self, parts: Iterable[str]) -> Mapping[str, Tokens]:
        return self._tokeniser.whole(parts, self._bare)

    def _before(self) -> Callable[[str], Tokens]:
        """The special tokens before a text."""
        usual = self._tokeniser.whole([""], self._options)[""]
        return lambda text: NO_TOKENS if self._is_complete(text) else usual


def _obstacle(tokenizer: Any) -> str | None:
    is_stock = isinstance(tokenizer, TokenizersBackend) and type(tokenizer)._encode_plus is _stock_encode
    return cuts.obstacle(tokenizer.backend_tokenizer) if is_stock else "its own code"


_stock_encode = TokenizersBackend._encode_plus


def _join(before: Tokens, parts: Iterable[str], tokens: Mapping[str, Tokens]) -> Tokens:
    return np.concatenate([before, *map(tokens.__getitem__, parts)])


def _equal(found: Any, expected: Any) -> bool:
    """Of arrays or of tuples of them."""
    if isinstance(found, tuple):
        return all(map(np.array_equal, found, expected))
    return np.array_equal(found, expected)
