"""What stands for an image where no chat template says it: what each family's own processor looks for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from digits import MODEL
from transformers import AutoConfig, AutoTokenizer

from gpu_pool.evaluator.placeholders import image_placeholder
from gpu_pool.evaluator.prompts import PromptEncoder
from gpu_pool.records import ModelArgs
from gpu_pool.worker.engine.multimodal_checks import render

TOKENS = {
    **{"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>", "video_token": "<vid>"},
    **{"audio_token": "<aud>", "boa_token": "<boa>", "eoa_token": "<eoa>"},
}
FAMILIES = {"gemma3": "<boi>", "gemma3n": "<img>", "gemma4": "<img>", "janus": "<img>", "chameleon": "<img>"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """It knows both a token that begins an image and one that stands for it."""
    return AutoTokenizer.from_pretrained(MODEL, extra_special_tokens=TOKENS)


@pytest.mark.parametrize(("family", "expected"), [*FAMILIES.items(), ("cohere2_vision", None), ("unheard_of", None)])
def test_what_a_processor_looks_for(tokenizer: Any, family: str, expected: str | None) -> None:
    assert image_placeholder(family, tokenizer) == expected


@pytest.mark.parametrize(("family", "expected"), [("gemma3", "<boi>"), ("gemma3n", "<img>"), ("internvl", "<img>")])
def test_prompts_without_a_chat_template(tokenizer: Any, tmp_path: Path, family: str, expected: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(MODEL / "processor_config.json", tmp_path)
    config = AutoConfig.for_model(family, image_token_id=tokenizer.convert_tokens_to_ids("<img>"))
    encoder = PromptEncoder(ModelArgs(pretrained=str(tmp_path)), config)
    assert encoder.place_media("<image>Which digit?") == f"{expected}Which digit?"


def test_the_engine_s_own_questions(tokenizer: Any) -> None:
    processor = transformers.JanusProcessor(transformers.JanusImageProcessorPil(), tokenizer)
    assert render(processor, "What?") == "<img>What?"
