"""What perfect sharing takes, on requests that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_limit import Costs, Peaks, Step, Work, measure_peaks, work_of
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.evaluator.requests import Unit

COSTS = Costs(token=1_000_000, position=10_000, look=1, weights=500_000, keys_and_values=100)
OPTIONS = GenerationOptions(until=(), max_gen_toks=8, do_sample=False, kwargs={})


def unit(prompt: list[int], continuation: tuple[int, ...] = (), options: GenerationOptions | None = None) -> Unit:
    return Unit(np.array(prompt, np.uint32), np.array(continuation, np.uint32), options)


def test_a_shared_context_is_read_and_scored_once() -> None:
    units = {unit([1, 2, 3], (4, 5)), unit([1, 2, 3], (4, 6)), unit([1, 2, 3], (7,))}
    # 1 2 3 4 are read, the last tokens never; scored are the positions of 3 and of 4
    assert work_of(COSTS, units, {}) == Work(4 * 1_000_000 + 2 * 10_000 + (1 + 2 + 3 + 4), [])


def test_sequences_go_on_together_until_each_has_ended() -> None:
    units = {unit([1, 2, 3], options=OPTIONS), unit([1, 2, 4], options=OPTIONS)}
    work = work_of(COSTS, units, {(1, 2, 3): 2, (1, 2, 4): 3})
    assert work.flops == 4 * 1_000_000 + 2 * 10_000 + (1 + 2 + 3 + 3)
    assert work.steps == [
        Step(2 * 1_010_000 + 2 * (3 + 1), 500_000 + 100 * (4 + 2)),
        Step(1 * 1_010_000 + 1 * (3 + 2), 500_000 + 100 * (3 + 2)),
    ]


def test_one_written_token_comes_with_the_prompt() -> None:
    assert work_of(COSTS, {unit([1], options=OPTIONS)}, {(1,): 1}).steps == []


def test_a_step_takes_the_larger_of_both_times() -> None:
    steps = [Step(flops=10, read=10), Step(flops=10, read=40)]
    peaks = Peaks(flops=5.0, bandwidth=10.0)
    assert [step.waits_for_memory(peaks) for step in steps] == [False, True]
    assert Work(20, steps).seconds(peaks) == 20 / 5 + 10 / 5 + 40 / 10


def test_costs_of_a_model_with_grouped_queries() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    layers = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24 + 2 * 16) + 16
    assert Costs.of(model) == Costs(
        token=2 * layers,
        position=2 * 16 * 50,
        look=4 * 2 * 16,
        weights=2 * (layers + 16 * 50),
        keys_and_values=2 * 2 * 8 * 2,
    )


def test_costs_of_a_state_space_model() -> None:
    """The products that its weights take, and nothing that grows with what was read."""
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=50))
    costs = Costs.of(model)
    layers = sum(weight.numel() for weight in model.parameters()) - 16 * 50
    assert costs == Costs(
        token=2 * layers, position=2 * 16 * 50, look=0, weights=4 * (layers + 16 * 50), keys_and_values=0
    )


@pytest.mark.slow
def test_peaks_are_measured() -> None:
    peaks = measure_peaks(torch.float32)
    assert peaks.flops > 0
    assert peaks.bandwidth > 0
