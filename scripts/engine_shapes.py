"""Other shapes of requests than the goals' workloads have, each small and made of real text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from engine_workloads import GREEDY, Library, Tasks, Workload, long_texts, spread
from lm_eval.api.instance import Instance

_CHARACTERS_A_TOKEN = 4
"""Or a little more: a text of so many for each token of the model's context about fits into it."""
_DEEP_TEXT = 6_000
"""Characters of the text that the deep tree grows along: about 1,500 tokens."""
_LONG_CHOICE = 850
"""Characters of a choice of about two hundred tokens."""
_REPEATS = 8


def deep_tree(library: Library, documents: int) -> list[Instance]:
    """One text, ever further: each document asks how it goes on, of two choices, a little deeper than the one before.

    The token tree is as deep as there are documents, and branches at each.
    """
    words = _long_text(min(_DEEP_TEXT, _CHARACTERS_A_TOKEN * library.max_length)).split(" ")
    cuts = [len(words) * (index + 1) // (documents + 2) for index in range(documents + 1)]
    return [
        request
        for index in range(documents)
        for request in _choices(
            "deep", index, " ".join(words[: cuts[index]]), [_words(words, cuts[index]), _words(words, cuts[index + 1])]
        )
    ]


def distinct_prefixes(library: Library, documents: int) -> list[Instance]:
    """Questions that have nothing in common, each with one short answer to score."""
    asked = _questions(library, documents)
    return [r for i, (prompt, answer) in enumerate(asked) for r in _choices("distinct", i, prompt, [answer])]


def one_long_document(library: Library, documents: int) -> list[Instance]:
    """The first document nearly fills the model's context; the others are short questions."""
    words = _long_text(_CHARACTERS_A_TOKEN * library.max_length).split(" ")
    long = _choices("long", 0, " ".join(words[:-8]), [_words(words, len(words) - 8)])
    asked = _questions(library, documents - 1)
    short = (r for i, (prompt, answer) in enumerate(asked) for r in _choices("long", i + 1, prompt, [answer]))
    return [*long, *short]


def long_choices(library: Library, documents: int) -> list[Instance]:
    """Which of four passages of about two hundred tokens answers the question?"""
    rows = [row for row in library.rows("aps/super_glue/boolq", "validation") if len(row["passage"]) > _LONG_CHOICE]
    rows = [rows[index] for index in spread(len(rows), documents + 3)]
    passages = [" " + row["passage"][:_LONG_CHOICE].rsplit(" ", 1)[0] for row in rows]
    return [
        request
        for index, row in enumerate(rows[:documents])
        for request in _choices(
            "passages", index, f"Question: {row['question']}?\nPassage:", passages[index : index + 4]
        )
    ]


def empty_contexts(library: Library, documents: int) -> list[Instance]:
    """How likely are sentences after nothing at all?"""
    rows = library.rows("Rowan/hellaswag", "validation")
    chosen = (rows[index]["ctx"] for index in spread(len(rows), documents))
    return [request for index, text in enumerate(chosen) for request in _choices("empty", index, "", [text])]


def repeated(library: Library, documents: int) -> list[Instance]:
    """The same few documents again and again, as if they were others."""
    rows = library.rows("Rowan/hellaswag", "validation")
    chosen = [rows[index] for index in spread(len(rows), -(-documents // _REPEATS))]
    return [
        request
        for index in range(documents)
        for row in [chosen[index // _REPEATS]]
        for request in _choices("repeated", index, row["ctx"], [f" {ending}" for ending in row["endings"]])
    ]


def distinct_prompts(library: Library, documents: int) -> list[Instance]:
    """Questions that have nothing in common, answered in a line: texts of very different lengths."""
    arguments = {"until": ["\n"], **GREEDY}
    return [
        Instance("generate_until", {}, (prompt, dict(arguments)), 0, metadata=("answers", index, 1))
        for index, (prompt, _) in enumerate(_questions(library, documents))
    ]


def _questions(library: Library, count: int) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of NQ-open."""
    rows = library.rows("google-research-datasets/nq_open", "validation")
    for index in spread(len(rows), count):
        yield f"Question: {rows[index]['question']}?\nAnswer:", f" {rows[index]['answer'][0]}"


def _choices(task: str, document: int, context: str, continuations: Sequence[str]) -> list[Instance]:
    fields: dict[str, Any] = {"metadata": (task, document, 1)}
    return [
        Instance("loglikelihood", {}, (context, continuation), index, **fields)
        for index, continuation in enumerate(continuations)
    ]


def _words(words: Sequence[str], start: int) -> str:
    """The eight from `start` on, as a continuation."""
    return " " + " ".join(words[start : start + 8])


def _long_text(characters: int) -> str:
    """As many characters of the longest texts, in one line."""
    return " ".join(" ".join(long_texts()).split())[:characters]


SHAPES = (
    Workload("deep tree", 6, 32, deep_tree),
    Workload("distinct prefixes", 128, 2_000, distinct_prefixes),
    Workload("one long document", 32, 32, one_long_document),
    Workload("one-token choices", 24, 24, Tasks(("boolq",))),
    Workload("200-token choices", 12, 12, long_choices),
    Workload("empty contexts", 64, 256, empty_contexts),
    Workload("repeated requests", 16, 64, repeated),
    Workload("distinct prompts", 32, 32, distinct_prompts),
)
