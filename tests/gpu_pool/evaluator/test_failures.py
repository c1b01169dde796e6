from __future__ import annotations

import errno

import pytest

from gpu_pool.errors import InvalidRequest
from gpu_pool.evaluator.failures import MAX_CHARACTERS, explain


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InvalidRequest("limit", "must be positive"), "limit: must be positive"),
        (ValueError("first line\n  second line"), "ValueError: first line second line"),
        (KeyError("question"), "KeyError: 'question'"),
        (AssertionError(), "AssertionError"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/r.json"),
            "OSError: [Errno 28] No space left on device: '/data/r.json'; make room there and submit the job again",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "OSError: [Errno 122] Disk quota exceeded; make room for the data folder, the output folder and HF_HOME "
            "and submit the job again",
        ),
    ],
)
def test_one_sentence(error: Exception, sentence: str) -> None:
    assert explain(error) == sentence


def test_long_texts_are_cut() -> None:
    assert len(explain(ValueError("x" * 10_000))) == MAX_CHARACTERS


def test_secrets_of_the_environment_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hf_verysecret")
    assert explain(OSError("401 for bearer hf_verysecret")) == "OSError: 401 for bearer ***"
