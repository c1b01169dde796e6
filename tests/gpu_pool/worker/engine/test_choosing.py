"""Which options the tree route understands, and that it chooses what transformers' generate does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chunks import generating
from engine_probes import fresh, never, plainly, watched

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.worker.engine.choosing import make_chooser
from gpu_pool.worker.engine.generation import generate, generate_chunks

PROMPTS = [(5, 6, 7), tuple(range(20, 60)), (*range(20, 60), 7), (9,), (30, 40) * 8]
SEEDS = tuple(range(10, 15))

GREEDY: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},  # of no effect
    {"num_beams": 1},
    {"repetition_penalty": 1.0},
    {"no_repeat_ngram_size": 0},
    {"eos_token_id": 40},
    {"eos_token_id": [40, 41, 42]},
    {"renormalize_logits": True},
]
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "typical_p": 0.9},
    {"temperature": 1.0, "epsilon_cutoff": 0.01},
    {"temperature": 1.0, "eta_cutoff": 0.01},
    {"temperature": 1.0, "top_h": 0.5},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "eos_token_id": list(range(3, 60))},
]
MANY = list(range(3, 200))
"""Tokens, most of them."""
BY_ROW: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"min_length": 12, "eos_token_id": MANY},
    {"min_new_tokens": 5, "eos_token_id": MANY},
    {"bad_words_ids": [[token] for token in MANY]},
    {"bad_words_ids": [[first, second] for first in range(3, 300, 2) for second in (*PROMPTS[1], 250, 260)]},
    {"suppress_tokens": MANY},
    {"begin_suppress_tokens": MANY},
    {"forced_bos_token_id": 8},
    {"forced_eos_token_id": 5},
    {"encoder_repetition_penalty": 3.0},
    {"encoder_no_repeat_ngram_size": 1},
    {"sequence_bias": [[[5], 20.0]]},
    {"exponential_decay_length_penalty": (3, 3.0)},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "begin_suppress_tokens": [3, 4]},
]
PLAIN: dict[str, dict[str, Any]] = {
    "its options mean beam search": {"num_beams": 3},
    "max_length is among its options": {"max_length": 60},
    "max_time is among its options": {"max_time": 1000.0},
    "its options need WatermarkLogitsProcessor": {"watermarking_config": {"greenlist_ratio": 0.25}},
}
REFUSED: list[dict[str, Any]] = [{"temperature": -1.0}, {"top_p": 3.0}]


def both_ways(loaded: Any, **fields: Any) -> tuple[tuple[str, ...], tuple[str, ...], list[int]]:
    """(our texts, those of the plain way, tokens of the plain passes of ours)."""
    chunk = generating(PROMPTS, seeds=SEEDS, **{"max_gen_toks": 12, **fields})
    with watched(loaded) as passes:
        ours = generate(fresh(loaded), chunk, never)
    return ours, generate(plainly(loaded), chunk, never), passes.plain


@pytest.mark.parametrize("kwargs", GREEDY, ids=str)
def test_greedy(kwargs, checkpoint, load):
    ours, theirs, plain_passes = both_ways(load(checkpoint("llama")), kwargs=kwargs)
    assert ours == theirs
    assert plain_passes == []


@pytest.mark.parametrize("kwargs", SAMPLED, ids=str)
def test_sampled(kwargs, checkpoint, load):
    ours, theirs, plain_passes = both_ways(load(checkpoint("llama")), do_sample=True, kwargs=kwargs)
    assert ours == theirs
    assert plain_passes == []
    assert len(set(ours)) == len(PROMPTS)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kwargs", BY_ROW, ids=lambda kwargs: " ".join(kwargs))
def test_options_that_look_at_a_rows_own_tokens(kwargs, sampling, checkpoint, load):
    """Rows of any length beside each other, refilled as they end: each as transformers continues it alone."""
    fields: dict[str, Any] = {"do_sample": bool(sampling), "batch_size": 3}
    ours, theirs, plain_passes = both_ways(load(checkpoint("llama")), kwargs=kwargs | sampling, **fields)
    assert ours == theirs
    assert plain_passes == []
    ends = {name: value for name, value in kwargs.items() if name == "eos_token_id"}
    without, _, _ = both_ways(load(checkpoint("llama")), kwargs=ends | sampling, **fields)
    assert ours != without, "the option has no effect"


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("gpu_pool.")]


@pytest.mark.parametrize(("why", "kwargs"), PLAIN.items(), ids=str)
def test_options_that_look_at_more_than_a_row_take_the_plain_way_and_say_so(why, kwargs, checkpoint, load, caplog):
    loaded = fresh(load(checkpoint("llama")))
    chunk = generating(PROMPTS, seeds=SEEDS, max_gen_toks=12, kwargs=kwargs)
    with watched(loaded) as passes:
        [ended] = generate_chunks(loaded, chunk, never, lambda: None)
        list(generate_chunks(loaded, chunk, never, lambda: None))
    assert ended.texts == generate(plainly(loaded), chunk, never)
    assert passes.plain
    assert ended.plainly == why
    assert said(caplog) == [f"some texts are computed the plain way: {why}"]


def test_nothing_is_said_of_what_goes_along_the_tree(checkpoint, load, caplog):
    """Nor of a model that never does: that was said when it was loaded."""
    chunk = generating(PROMPTS, max_gen_toks=2, kwargs={"repetition_penalty": 1.5})
    for name in ("llama", "mamba"):
        [ended] = generate_chunks(load(checkpoint(name)), chunk, never, lambda: None)
        assert ended.plainly == ""
    assert said(caplog) == []


@pytest.mark.parametrize("kwargs", REFUSED, ids=str)
def test_refused_both_ways(kwargs, checkpoint, load):
    loaded = load(checkpoint("llama"))
    chunk = generating(PROMPTS, seeds=SEEDS, max_gen_toks=4, do_sample=True, kwargs=kwargs)
    for copy in (fresh(loaded), plainly(loaded)):
        with pytest.raises(ValueError, match="has to be"):
            generate(copy, chunk, never)


def test_defaults_of_the_checkpoint_count(checkpoint, load, monkeypatch):
    """What generate would take from the checkpoint's own generation config."""
    loaded = load(checkpoint("llama"))
    monkeypatch.setattr(loaded.model.generation_config, "repetition_penalty", 1.5)
    ours, theirs, plain_passes = both_ways(loaded)
    assert ours == theirs
    assert not plain_passes
    monkeypatch.setattr(loaded.model.generation_config, "repetition_penalty", None)
    assert both_ways(loaded)[0] != ours
    monkeypatch.setattr(loaded.model.generation_config, "top_k", 3)
    ours, theirs, plain_passes = both_ways(loaded, do_sample=True, kwargs={"temperature": 1.0})
    assert ours == theirs
    assert not plain_passes


def test_draws_follow_each_row_alone(checkpoint, load):
    """One row's next draw does not depend on which rows are drawn with it."""
    options = GenerationOptions(max_gen_toks=5, do_sample=True, kwargs={"temperature": 1.0})
    chooser = make_chooser(load(checkpoint("llama")).model, options)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))

    def draws(rows: list[int]) -> list[list[int]]:
        started = [chooser.start((5, 6), row) for row in rows]
        return [chooser.choose(logits[rows], started) for _ in range(20)]

    together = draws([0, 1, 2, 3])
    assert [step[2] for step in together] == [step[0] for step in draws([2])]
    assert [step[1] for step in together] == [step[1] for step in draws([3, 1])]
    assert len({step[2] for step in together}) > 3


def test_greedy_choice(checkpoint, load):
    chooser = make_chooser(load(checkpoint("llama")).model, GenerationOptions(max_gen_toks=5))
    rows = [chooser.start((5,), seed) for seed in range(3)]
    assert chooser.choose(torch.eye(3), rows) == [0, 1, 2]
    assert chooser.eos == {load(checkpoint("llama")).tokenizer.eos_token_id}
