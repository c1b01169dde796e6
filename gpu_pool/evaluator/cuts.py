"""Where a text may be cut so that the tokens of its parts, one after the other, are the tokens of the text.

A cut lies between an ASCII letter or digit and a newline or space that follows it. A tokenizer allows cuts when each of
its steps does, for every text; a step that is not known to is an obstacle, and texts stay whole:

- Added tokens are found first. None may hold a cut, or look beyond one for its conditions (`rstrip`, `single_word`…).
- A normalizer (none, or NFC) must not join what is on both sides: neither a space nor a newline composes with anything.
- A pre-tokenizer splits from left to right. That is the same on both sides of a cut if no alternative of its pattern
  matches a letter or digit together with whitespace after it, if it looks back never and ahead only after whitespace
  (which has something else after it left of a cut), and one that matches all whitespace makes the cut a boundary.
- A BPE model without dropout sees one pre-token at a time.
- Special tokens are put before the text, none after it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

_NEWLINE = re.compile(r"\n(?<=[A-Za-z0-9]\n)")
_LAST_SPACE = re.compile(r".*[A-Za-z0-9](?= )", re.DOTALL)
_CUT = re.compile(r"[A-Za-z0-9][ \n]")

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BREAK = r"[^\r\n\p{L}\p{N}]?"
ALTERNATIVES = frozenset(
    {
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _ENDINGS, r"'(?i:[sdmt]|ll|ve|re)"),
        *(r" ?\p{L}+", _BREAK + r"\p{L}+", _BREAK + r"+\p{L}+", _BREAK + r"[\p{L}\p{M}]+"),
        *(f"{_BREAK}{_UPPER}*{_LOWER}+{ending}" for ending in ("", _ENDINGS + "?")),
        *(f"{_BREAK}{_UPPER}+{_LOWER}*{ending}" for ending in ("", _ENDINGS + "?")),
        *(r" ?\p{N}+", r"\p{N}+", r"\p{N}", r"\p{N}{1,3}"),
        *(r" ?[^\s\p{L}\p{N}]+" + after for after in ("", r"[\r\n]*", r"[\r\n/]*", r"+[\r\n]*")),
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        *(r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"),
    }
)
"""Of the patterns of GPT-2, GPT-4 (cl100k, o200k), Llama 3, Qwen 2 and 3.5, OLMo 2, Mistral's Tekken and their kin."""
_ALL_WHITESPACE = r"\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel splits by


def lines(text: str) -> list[str]:
    """The parts of a text that is cut before newlines; at least one, maybe empty."""
    cuts = [match.start() for match in _NEWLINE.finditer(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def before_last_word(text: str) -> tuple[str, str]:
    """The parts of a text that is cut before one space, the last possible one; the first is empty where none is."""
    match = _LAST_SPACE.match(text)
    cut = match.end() if match else 0
    return text[:cut], text[cut:]


def obstacle(tokenizer: Tokenizer) -> str | None:
    """What keeps texts from being cut for this tokenizer; None when they can be."""
    model = tokenizer.model
    if not isinstance(model, BPE) or model.dropout:
        return "its model is not a BPE without dropout"
    for token in tokenizer.get_added_tokens_decoder().values():
        if _reaches_over_cuts(token):
            return f"its added token {token.content!r}"
    if _state(tokenizer.normalizer).get("type") not in (None, "NFC"):
        return "its normalizer"
    steps = list(_flat(_state(tokenizer.pre_tokenizer), "pretokenizers"))
    patterns = [pattern for step in steps if (pattern := _patterns(step)) is not None]
    if len(patterns) < len(steps) or not all(known for known, _ in patterns) or not any(every for _, every in patterns):
        return "its pre-tokenizer"
    if not all(_only_puts_before(step) for step in _flat(_state(tokenizer.post_processor), "processors")):
        return "its post-processor"
    return None


def _reaches_over_cuts(token: AddedToken) -> bool:
    content = unicodedata.normalize("NFC", token.content)
    looks_around = token.single_word or token.lstrip or token.rstrip
    at_the_ends = re.search(r"^[A-Za-z0-9\s]|[A-Za-z0-9\s]$", content)
    return _CUT.search(content) is not None or bool(looks_around and at_the_ends)


def _patterns(step: dict[str, Any]) -> tuple[bool, bool] | None:
    """(Whether every alternative is known, whether one matches all whitespace) of one pre-tokenizer; None: unknown."""
    match step:
        case {"type": "Digits"}:
            return True, False
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(split)}:
            alternatives = _alternatives(_GPT2) if split else []
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False} | {
            "type": "Split",
            "pattern": {"Regex": str(pattern)},
            "behavior": "Removed",
            "invert": True,
        }:
            alternatives = _alternatives(pattern)
        case _:
            return None
    return ALTERNATIVES.issuperset(alternatives), _ALL_WHITESPACE in alternatives


def _alternatives(pattern: str) -> list[str]:
    """What stands between the `|` of a regular expression that are outside of groups and classes."""
    found = [""]
    depth, in_class = 0, False
    for token in re.findall(r"\\.|.", pattern, re.DOTALL):
        in_class = token == "[" or (in_class and token != "]")
        depth += not in_class and {"(": 1, ")": -1}.get(token, 0)
        if token == "|" and not depth and not in_class:
            found.append("")
        else:
            found[-1] += token
    return found


def _only_puts_before(step: dict[str, Any]) -> bool:
    match step:
        case {"type": "ByteLevel"}:
            return True
        case {"type": "TemplateProcessing", "single": [*before, {"Sequence": {"id": "A"}}]}:
            return all("SpecialToken" in part for part in before)
        case _:
            return False


def _flat(step: dict[str, Any], key: str) -> Iterable[dict[str, Any]]:
    """The steps of a sequence of steps; none for no step."""
    if step.get("type") == "Sequence":
        for inner in step[key]:
            yield from _flat(inner, key)
    elif step:
        yield step


def _state(step: Any) -> dict[str, Any]:
    """A step as it stands in tokenizer.json; empty for none."""
    return {} if step is None else json.loads(step.__getstate__())
