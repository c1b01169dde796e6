"""Conversations of lmms-eval's tasks."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_pool.evaluator.task_index import LMMS_EVAL_ROOT
from gpu_pool.records import TEXT_ONLY, Modality

if LMMS_EVAL_ROOT is None:
    pytest.skip("lmms-eval is not installed", allow_module_level=True)

import gpu_pool.evaluator.lmms_tasks  # noqa: F401  (undoes what importing lmms-eval does)
from gpu_pool.evaluator.lmms_prompts import chat_prompt

SEES: frozenset[Modality] = TEXT_ONLY | {"image"}
Turn = dict[str, Any]
QUESTION: Turn = {"role": "user", "content": [{"type": "image", "url": b"png"}, {"type": "text", "text": "Q"}]}
OWN: Turn = {"role": "system", "content": [{"type": "text", "text": "Think first."}]}


def turns(messages: list[Turn], system_instruction: str | None) -> list[tuple[str, Any]]:
    seen: list[tuple[str, Any]] = []

    def template(history: list[Turn]) -> str:
        seen.extend((turn["role"], turn["content"]) for turn in history)
        return ""

    _, media = chat_prompt(messages, template, modalities=SEES, system_instruction=system_instruction)
    assert media == {"visual": [b"png"]}
    return seen


@pytest.mark.parametrize("messages", [[OWN, QUESTION], [QUESTION]])
def test_a_request_s_system_turn_takes_the_place_of_the_task_s(messages: list[Turn]) -> None:
    assert [role for role, _ in turns(messages, "Be brief.")] == ["system", "user"]
    assert turns(messages, "Be brief.")[0] == ("system", "Be brief.")


def test_a_task_s_own_system_turn_stays_where_the_request_gives_none() -> None:
    assert turns([OWN, QUESTION], None)[0] == ("system", OWN["content"])
