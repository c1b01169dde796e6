"""Encoder-decoder models against lm-eval's HF backend, which calls them `seq2seq`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from chunks import generating, scoring
from engine_probes import never
from lm_eval_answers import (
    PROMPTS,
    VOCABULARY,
    answers,
    assert_agree,
    lm_eval_answers,
    lm_eval_texts,
    make_requests,
    texts,
)

from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loglikelihood import score

TYPES = ["t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "marian", "mbart", "m2m_100", "pegasus"]


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("model_type", TYPES)
def test_scores_equal_lm_eval(model_type, batch_size, checkpoint, load, reference):
    folder = checkpoint(model_type)
    requests = make_requests(40)
    assert reference(folder).backend == "seq2seq"
    assert_agree(answers(load(folder), requests, batch_size), lm_eval_answers(reference(folder), requests))


def test_scores_equal_lm_eval_in_batches(checkpoint, load, reference):
    requests = make_requests(40)
    theirs = lm_eval_answers(reference(checkpoint("t5"), batch_size=7), requests)
    assert_agree(answers(load(checkpoint("t5")), requests), theirs)


def test_greedy_continuations_are_found(checkpoint, load, reference):
    requests = tuple(((5, 6, 7), (token,)) for token in range(VOCABULARY))
    ours = answers(load(checkpoint("t5")), requests)
    assert [greedy for _, greedy in ours].count(True) == 1
    assert_agree(ours, lm_eval_answers(reference(checkpoint("t5")), requests))


def test_long_contexts_lose_their_beginning(checkpoint, load, reference):
    requests = make_requests(20)
    theirs = lm_eval_answers(reference(checkpoint("t5"), max_length=16), requests)
    assert_agree(answers(load(checkpoint("t5"), max_length=16), requests), theirs)


def test_rolling_equals_lm_eval(checkpoint, load, reference):
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    theirs = reference(checkpoint("t5"), max_length=16)
    text = "which of these is it? the city of Paris, of course. " * 4
    windows = get_rolling_token_windows(theirs.tok_encode(text), theirs.prefix_token_id, 16, 1)
    pairs = tuple((tuple(context), tuple(ids)) for context, ids in map(make_disjoint_window, windows))
    ours = sum(value for value, _ in answers(load(checkpoint("t5"), max_length=16), pairs))
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    assert ours == pytest.approx(theirs.loglikelihood_rolling([request], disable_tqdm=True)[0], rel=1e-5)


def passes(module: Any) -> tuple[list[tuple[int, ...]], Any]:
    """Shapes of a module's inputs as they come, and the hook to remove."""
    shapes: list[tuple[int, ...]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs.get("input_ids", args[0] if args else None).shape))

    return shapes, module.register_forward_pre_hook(note, with_kwargs=True)


def test_a_context_is_encoded_once_for_all_its_continuations(checkpoint, load):
    loaded = load(checkpoint("t5"))
    assert loaded.company is Company.ANY_LENGTH
    encoder, first = passes(loaded.model.get_encoder())
    decoder, second = passes(loaded.model.get_decoder())
    contexts = [(4, 5, 6), (7, 8)]
    choices = [(10,), (11,), (10, 12), (10, 12, 13), (14, 15)]
    answers(loaded, tuple((context, choice) for context in contexts for choice in choices))
    for hook in (first, second):
        hook.remove()
    assert encoder == [(2, 3)]
    assert decoder == [(4, 3)]  # two distinct decoder inputs a context: one begins all but (14, 15)


def test_batches_are_bounded(checkpoint, load):
    loaded = load(checkpoint("t5"))
    small = dataclasses.replace(loaded, limits=dataclasses.replace(loaded.limits, scored_tokens=64))
    encoder, hook = passes(loaded.model.get_encoder())
    answers(small, make_requests(30, longest=30))
    hook.remove()
    assert 1 < len(encoder) < 30
    assert all(rows * width <= 64 for rows, width in encoder)


def test_out_of_memory_halves_the_batch(checkpoint, load):
    import torch

    loaded = load(checkpoint("t5"))
    requests = make_requests(12)
    whole = answers(loaded, requests)

    def three_rows_at_most(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hooks = [
        half.register_forward_pre_hook(three_rows_at_most, with_kwargs=True)
        for half in (loaded.model.get_encoder(), loaded.model.get_decoder())
    ]
    halved = answers(loaded, requests)
    for hook in hooks:
        hook.remove()
    assert_agree(halved, whole)


@pytest.mark.parametrize(
    ("context", "continuation", "problem"),
    [
        ((), (1,), "empty"),
        ((1,), (), "empty"),
        ((1,), (1,) * 300, "exceeds the context of 256"),
        ((100_000,), (1,), "token ids must lie in"),
    ],
)
def test_refused(context, continuation, problem, checkpoint, load):
    with pytest.raises(ValueError, match=problem):
        answers(load(checkpoint("t5")), ((context, continuation),))


def test_cancelled_before_the_next_pass(checkpoint, load):
    asked = iter([False, False, True])
    chunk = scoring(make_requests(9), batch_size=1)
    with pytest.raises(Cancelled):
        score(load(checkpoint("t5")), chunk, lambda: next(asked))


def test_an_encoder_that_sees_its_padding_is_not_padded(checkpoint, load, reference):
    """Pooled over the whole width, mask or not: only contexts of one length may share its batch."""
    import torch

    loaded = dataclasses.replace(load(checkpoint("t5")))
    encoder = loaded.model.get_encoder()
    hook = encoder.register_forward_hook(
        lambda module, args, output: output.__setitem__(
            "last_hidden_state", output.last_hidden_state + 9 * torch.tanh(output.last_hidden_state.mean(1, True))
        )
    )
    requests = make_requests(30, longest=5)
    ours = answers(loaded, requests)
    alone = answers(loaded, requests, 1)
    hook.remove()
    assert loaded.company is Company.EQUAL_LENGTH
    assert_agree(ours, alone)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("model_type", TYPES)
def test_texts_equal_lm_eval(model_type, batch_size, checkpoint, load, reference):
    folder = checkpoint(model_type)
    ours = texts(load(folder), PROMPTS, batch_size, max_gen_toks=12)
    assert ours == lm_eval_texts(reference(folder), PROMPTS, max_gen_toks=12)
    assert len(set(ours)) > 3


@pytest.mark.parametrize("batch_size", [1, None])
def test_stop_strings(batch_size, checkpoint, load, reference):
    folder = checkpoint("t5")
    unstopped = texts(load(folder), PROMPTS, max_gen_toks=12)
    until = [text[5:7] for text in unstopped[:3]]
    ours = texts(load(folder), PROMPTS, batch_size, max_gen_toks=12, until=tuple(until))
    assert ours == lm_eval_texts(reference(folder), PROMPTS, max_gen_toks=12, until=list(until))
    assert ours != unstopped


def test_generation_ends_with_the_last_stop_string(checkpoint, load):
    loaded = load(checkpoint("t5"))
    until = tuple({text[3] for text in texts(loaded, PROMPTS[:4], max_gen_toks=100)})
    steps, hook = passes(loaded.model.get_decoder())
    texts(loaded, PROMPTS[:4], max_gen_toks=100, until=until)
    hook.remove()
    assert len(steps) < 50


def test_long_prompts_lose_their_beginning_whatever_is_to_be_generated(checkpoint, load, reference):
    folder = checkpoint("t5")
    ours = texts(load(folder, max_length=20), PROMPTS, max_gen_toks=24)
    assert ours == lm_eval_texts(reference(folder, max_length=20), PROMPTS, max_gen_toks=24)


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"repetition_penalty": 1.5}, {"encoder_repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}),
        *({"encoder_no_repeat_ngram_size": 2}, {"num_beams": 3}, {"forced_eos_token_id": 9}, {"max_length": 20}),
        {"eos_token_id": 63},
    ],
)
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_options_equal_lm_eval_one_at_a_time(model_type, kwargs, checkpoint, load, reference):
    folder = checkpoint(model_type)
    theirs = lm_eval_texts(reference(folder), PROMPTS, max_gen_toks=12, until=["e"], **kwargs)
    assert texts(load(folder), PROMPTS, max_gen_toks=12, until=("e",), kwargs=kwargs) == theirs


def test_think_end_token(checkpoint, load, reference):
    folder = checkpoint("t5")
    text = texts(load(folder), PROMPTS[:1], max_gen_toks=24)[0]
    until = [text[2:4]]
    for mark in (text[6:8], str(load(folder).tokenizer.encode(text[6:])[0])):
        theirs = lm_eval_texts(reference(folder, think_end_token=mark), PROMPTS, max_gen_toks=24, until=until)
        loaded = load(folder, think_end_token=mark)
        assert texts(loaded, PROMPTS, max_gen_toks=24, until=tuple(until)) == theirs


SAMPLING: dict[str, Any] = {
    "max_gen_toks": 12,
    "do_sample": True,
    "kwargs": {"temperature": 3.0, "top_p": 0.95, "top_k": 50},
}


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}])
def test_sampling_does_not_depend_on_the_batch(kwargs, checkpoint, load):
    loaded = load(checkpoint("t5"))
    options = SAMPLING | {"kwargs": SAMPLING["kwargs"] | kwargs}
    seeds = tuple(range(len(PROMPTS)))
    ours = texts(loaded, PROMPTS, None, seeds, **options)
    assert ours == texts(loaded, PROMPTS[::-1], 3, seeds[::-1], **options)[::-1]
    assert ours != texts(loaded, PROMPTS, None, tuple(seed + 100 for seed in seeds), **options)


def test_samples_of_one_prompt_share_its_encoding(checkpoint, load):
    loaded = load(checkpoint("t5"))
    assert loaded.company is Company.ANY_LENGTH
    encoder, hook = passes(loaded.model.get_encoder())
    samples = texts(loaded, PROMPTS[:1] * 6, None, tuple(range(6)), **SAMPLING)
    hook.remove()
    assert [rows for rows, _ in encoder] == [1]
    assert len(set(samples)) > 1


def test_empty_prompt_starts_from_the_prefix_token(checkpoint, load):
    loaded = load(checkpoint("t5"))
    prefix = generating([(loaded.prefix_token_id,)], max_gen_toks=8)
    assert texts(loaded, [""], max_gen_toks=8) == generate(loaded, prefix, never)


def test_generation_is_cancelled_at_the_next_token(checkpoint, load):
    asked = iter([False, False, True])
    chunk = generating([(5, 6)], max_gen_toks=100)
    with pytest.raises(Cancelled):
        generate(load(checkpoint("t5")), chunk, lambda: next(asked))
