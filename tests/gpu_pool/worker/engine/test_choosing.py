"""Which options the tree route understands, and that it chooses what transformers' generate does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chunks import generating
from engine_probes import fresh, never, plainly, watched

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.worker.engine.choosing import make_chooser
from gpu_pool.worker.engine.generation import generate

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
PLAIN: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3},
    {"max_length": 60},
    {"min_length": 10},
    {"min_new_tokens": 5},
    {"bad_words_ids": [[5]]},
    {"suppress_tokens": [5, 6]},
    {"begin_suppress_tokens": [5]},
    {"forced_eos_token_id": 5},
    {"encoder_repetition_penalty": 1.5},
    {"encoder_no_repeat_ngram_size": 2},
    {"sequence_bias": [[[5], 2.0]]},
    {"exponential_decay_length_penalty": [3, 1.1]},
]
REFUSED: list[dict[str, Any]] = [{"temperature": -1.0}, {"top_p": 3.0}]


def both_ways(loaded: Any, **fields: Any) -> tuple[tuple[str, ...], tuple[str, ...], list[int]]:
    """(our texts, those of the plain way, tokens of the plain passes of ours)."""
    chunk = generating(PROMPTS, seeds=SEEDS, max_gen_toks=12, **fields)
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


@pytest.mark.parametrize("kwargs", PLAIN, ids=str)
def test_options_that_look_at_more_than_a_position_take_the_plain_way(kwargs, checkpoint, load):
    ours, theirs, plain_passes = both_ways(load(checkpoint("llama")), kwargs=kwargs)
    assert ours == theirs
    assert plain_passes


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
    assert plain_passes
    monkeypatch.setattr(loaded.model.generation_config, "repetition_penalty", None)
    monkeypatch.setattr(loaded.model.generation_config, "top_k", 3)
    ours, theirs, plain_passes = both_ways(loaded, do_sample=True, kwargs={"temperature": 1.0})
    assert ours == theirs
    assert not plain_passes


def test_draws_follow_each_row_alone(checkpoint, load):
    """One row's next draw does not depend on which rows are drawn with it."""
    options = GenerationOptions(max_gen_toks=5, do_sample=True, kwargs={"temperature": 1.0})
    chooser = make_chooser(load(checkpoint("llama")).model, options)
    assert chooser is not None
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))

    def draws(rows: list[int]) -> list[list[int]]:
        noises = [chooser.noise(row, torch.device("cpu")) for row in rows]
        return [chooser.choose(logits[rows], noises) for _ in range(20)]

    together = draws([0, 1, 2, 3])
    assert [step[2] for step in together] == [step[0] for step in draws([2])]
    assert [step[1] for step in together] == [step[1] for step in draws([3, 1])]
    assert len({step[2] for step in together}) > 3


def test_greedy_choice_draws_nothing(checkpoint, load):
    chooser = make_chooser(load(checkpoint("llama")).model, GenerationOptions(max_gen_toks=5))
    assert chooser is not None
    assert chooser.noise(1, torch.device("cpu")) is None
    assert chooser.choose(torch.eye(3), [None] * 3) == [0, 1, 2]
    assert chooser.eos == {load(checkpoint("llama")).tokenizer.eos_token_id}
