from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_pool.evaluator.task_modality import lm_eval_modality, lmms_eval_modality

CODE = """
import os

def picture(doc):
    return [doc["image"].convert("RGB")]

def nothing(doc):
    return []

def clip(doc):
    return [resolved(doc)]

def resolved(doc):
    return os.path.join("folder", doc["id"] + ".mp4")

def sound(doc):
    return [doc["audio"]]

def turns(doc):
    return [{"role": "user", "content": [{"type": "image", "url": doc["image"]}, {"type": "text", "text": "?"}]}]

def words(doc):
    return [{"role": "user", "content": [{"type": "text", "text": doc["question"]}]}]
"""


@pytest.mark.parametrize(
    ("config", "modality"),
    [
        ({}, "text"),
        ({"doc_to_visual": "picture"}, "image"),
        ({"doc_to_visual": "nothing"}, "text"),
        ({"doc_to_visual": "clip"}, "video"),
        ({"doc_to_visual": "sound"}, "audio"),
        ({"doc_to_visual": "missing"}, None),
        ({"doc_to_visual": "picture", "dataset_kwargs": {"video": True}}, "video"),
        ({"doc_to_messages": "turns"}, "image"),
        ({"doc_to_messages": "words"}, "text"),
    ],
)
def test_of_lmms_evals_tasks_the_functions_tell(config: dict[str, Any], modality: str | None, tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text(CODE)
    named = {key: f"{tmp_path}/utils.{value}" if isinstance(value, str) else value for key, value in config.items()}
    assert lmms_eval_modality(named) == modality


def test_a_column_is_one_of_images() -> None:
    assert lmms_eval_modality({"doc_to_visual": "image"}) == "image"


def test_of_lm_evals_tasks_the_yaml_tells() -> None:
    assert lm_eval_modality({}) == "text"
    assert lm_eval_modality({"doc_to_image": ["image"]}) == "image"
    assert lm_eval_modality({"doc_to_audio": ["audio"]}) == "audio"
