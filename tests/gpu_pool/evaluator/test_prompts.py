"""Token for token what lm-eval's HF backend makes of the same strings, whether the tokenizer adds a BOS or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from gpu_pool.evaluator.prompts import PromptEncoder, PromptError
from gpu_pool.records import ModelArgs

PAIRS = [
    ("what is the", " capital"),
    ("what is the ", "capital"),
    ("what is the \n\n ", "capital\n"),
    ("", " of France"),
    ("", "<|im_start|>system"),
    ("<|im_start|>user\nhi<|im_end|>\n", "Paris"),
    ("ünïcode 🙂", " 🙂"),
    ("the capital of Fr", "ance, of course"),
]
HISTORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!"}]


@pytest.fixture(scope="module", params=["plain", "adds-bos", "encoder-decoder"])
def checkpoint(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "plain":
        return tiny_model
    if request.param == "encoder-decoder":
        return request.getfixturevalue("tiny_t5")
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("bos") / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=[None, True, False])
def both(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[HFLM, PromptEncoder]:
    options: dict[str, Any] = {"pretrained": str(checkpoint), "add_bos_token": request.param, "dtype": "float32"}
    return HFLM(device="cpu", **options), PromptEncoder(ModelArgs(**options))


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs(both: tuple[HFLM, PromptEncoder], pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = both
    monkeypatch.setattr(theirs, "_loglikelihood_tokens", lambda requests, **_: requests)
    ((_, context, continuation),) = theirs.loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)
    found = ours.encode_pairs([("another", " pair"), pair])[1]
    assert [tokens.tolist() for tokens in found] == [context, continuation]


def test_prompts(both: tuple[HFLM, PromptEncoder]) -> None:
    theirs, ours = both
    prompts = [context for context, _ in PAIRS if context] + ["question " * 3000]
    tokens = ours.encode_prompts(prompts, room=100)
    for prompt in prompts:
        room = 0 if theirs.backend == "seq2seq" else 100  # what is generated takes none of an encoder's
        ids, _ = theirs.tok_batch_encode([prompt], left_truncate_len=theirs.max_length - room)
        assert tokens[prompt].tolist() == ids[0].tolist()


def test_model_limits(both: tuple[HFLM, PromptEncoder]) -> None:
    theirs, ours = both
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    assert ours.end_of_text == theirs.tok_decode(theirs.eot_token_id, skip_special_tokens=False)


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chat_template(both: tuple[HFLM, PromptEncoder], generation_prompt: bool) -> None:
    theirs, ours = both
    assert ours.chat_template(True) == theirs.chat_template(True)
    history = HISTORY if generation_prompt else [*HISTORY, {"role": "assistant", "content": "Answer:"}]
    expected = theirs.apply_chat_template(history, generation_prompt)
    assert ours.apply_chat_template(True, history, generation_prompt) == expected


def test_named_chat_templates(tiny_model: Path) -> None:
    encoder = PromptEncoder(ModelArgs(pretrained=str(tiny_model)))
    encoder.tokenizer.chat_template = {"default": "d {{ messages[0]['content'] }}", "tool": "t"}
    assert encoder.apply_chat_template(True, HISTORY) == "d Be brief."
    assert encoder.apply_chat_template("tool", HISTORY) == "t"
    with pytest.raises(PromptError, match="no chat template 'toll'; it has: default, tool"):
        encoder.apply_chat_template("toll", HISTORY)


def test_a_system_turn_that_the_template_refuses(tiny_model: Path) -> None:
    encoder = PromptEncoder(ModelArgs(pretrained=str(tiny_model)))
    encoder.tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn['role'] == 'system' %}{{ raise_exception('No system turns') }}{% endif %}"
        "{{ turn['content'] }}{% endfor %}"
    )
    assert encoder.apply_chat_template(True, HISTORY) == "Hi!"
    assert encoder.apply_chat_template(True, HISTORY[1:], keep_system=True) == "Hi!"
    with pytest.raises(PromptError, match="system_instruction: the model's chat template takes no system turn"):
        encoder.apply_chat_template(True, HISTORY, keep_system=True)


def test_a_blank_context_of_an_encoder_is_its_end_token(tiny_t5: Path) -> None:
    encoder = PromptEncoder(ModelArgs(pretrained=str(tiny_t5)))
    end = (encoder.tokenizer.eos_token_id,)
    (pair,) = encoder.encode_pairs([(" \n", "capital")])
    context, continuation = pair
    assert tuple(context.tolist()) == end
    assert continuation.tolist() == encoder.tokenizer.encode(" \ncapital", add_special_tokens=False)


def test_what_cannot_be_scored(tiny_model: Path) -> None:
    encoder = PromptEncoder(ModelArgs(pretrained=str(tiny_model), max_length=8))
    nothing, long, good = encoder.encode_pairs([("context", ""), ("", "abcdefghi" * 9), ("context", " Paris")])
    assert encoder.why_unscorable(*nothing) == "A context or continuation has no tokens: there is nothing to score"
    assert (encoder.why_unscorable(*long) or "").endswith("is longer than the model's maximum (8)")
    assert encoder.why_unscorable(*good) is None


@pytest.mark.parametrize("lengths", [(5, 4), (6, 4), (20, 1), (1, 8), (3, 8), (20, 8)])
def test_contexts_are_cut_as_lm_eval_cuts_them(tiny_model: Path, tiny_t5: Path, lengths: tuple[int, int]) -> None:
    """What the HF backend's model is given, but for a last token that it does not read."""
    context, continuation = (np.arange(5, 5 + length, dtype=np.uint32) for length in lengths)
    for model in (tiny_model, tiny_t5):
        options = {"pretrained": str(model), "max_length": 8, "dtype": "float32"}
        theirs, ours, given = HFLM(device="cpu", **options), PromptEncoder(ModelArgs(**options)), []
        theirs._model_call = lambda inputs, given=given, **more: given.append(inputs) or torch.zeros(1, 8, 400)
        theirs._loglikelihood_tokens([(("", ""), context.tolist(), continuation.tolist())], disable_tqdm=True)
        seen = ours.seen_context(context, continuation).tolist()
        read = seen if theirs.backend == "seq2seq" else (seen + continuation.tolist())[:-1]
        assert given[0].tolist() == [read]
