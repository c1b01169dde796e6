"""What the engine plans with, of all that is free or of a budget."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fresh_models import load_fresh

from gpu_pool.model_size import activation_bytes
from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.limits import Limits, _activation_bytes, find_limits, free_bytes
from gpu_pool.worker.engine.loading import load_model

CPU = torch.device("cpu")
MIB = 1024**2


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_budget_leaves_what_the_process_does_not_hold_yet() -> None:
    budget = resident() + 200 * MIB
    assert free_bytes(CPU, budget) == pytest.approx(200 * MIB, abs=20 * MIB)
    assert free_bytes(CPU, 1) == 0
    assert free_bytes(CPU, 1 << 60) == pytest.approx(free_bytes(CPU), rel=0.2)  # it can be no more than is free


def test_limits_follow_the_budget(checkpoint: Callable[..., Path]) -> None:
    model = load_fresh(checkpoint("llama")).model
    held = resident()
    limits = find_limits(model, CPU, budget=held + 100 * MIB)
    assert limits.held_bytes == pytest.approx(40 * MIB, abs=8 * MIB)
    assert limits.prefix_bytes == pytest.approx(10 * MIB, abs=2 * MIB)
    assert limits.logits_bytes == pytest.approx(10 * MIB, abs=2 * MIB)
    least = find_limits(model, CPU, budget=1)
    assert (least.held_bytes, least.scored_tokens) == (0, 128)  # it still computes, little at a time


@pytest.mark.parametrize(("name", "inner"), [("llama", 64), ("gemma3n_text", 96), ("gemma4_text", 64)])
def test_activations_are_those_of_the_widest_layer(name: str, inner: int, checkpoint: Callable[..., Path]) -> None:
    """Also where the config lists the layers' widths, or does not give what differs between them."""
    assert _activation_bytes(load_fresh(checkpoint(name)).model) == activation_bytes(32, inner, 1, 4)


def test_a_model_is_loaded_with_its_budget(checkpoint: Callable[..., Path]) -> None:
    spec = ModelSpec(kind="hf", args=ModelArgs(pretrained=str(checkpoint("llama"))), fingerprint="")
    budget = resident() + 50 * MIB
    assert load_model(spec, allow_remote_code=False, budget=budget).limits.prefix_bytes <= 5 * MIB


@pytest.fixture
def limits() -> Limits:
    return Limits(
        scored_tokens=30_000,
        worthwhile_tokens=0,
        generated_tokens=5000,
        generated_rows=1,
        held_bytes=1000,
        logits_bytes=0,
        prefix_bytes=0,
    )


def test_a_shortage_that_fails_the_chunk_is_forgotten(limits: Limits) -> None:
    before = dataclasses.replace(limits)

    def compute_in_vain() -> None:
        with limits.learning():
            limits.shrink(30_000)
            limits.shrink_generated(3000)
            limits.held_bytes = 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compute_in_vain()
    assert limits == before
    with limits.learning():
        limits.shrink(20_000)
    assert limits.scored_tokens == 10_000


def test_bounds_grow_back(limits: Limits) -> None:
    def compute(chunks: int) -> list[int]:
        sizes = []
        for _ in range(chunks):
            with limits.learning():
                pass
            sizes.append(limits.scored_tokens)
        return sizes

    with limits.learning():
        limits.shrink(16_000)
    assert compute(99) == [8000] * 99
    with limits.learning():
        limits.shrink(8000)
    assert compute(100) == [4000] * 99 + [8000], "from the latest shortage on"
    assert compute(300)[::100] == [8000, 16_000, 30_000]
    assert (limits.scored_tokens, limits.generated_tokens, limits.held_bytes) == (30_000, 5000, 1000)


def test_a_block_that_cannot_be_cut_changes_nothing(limits: Limits) -> None:
    assert not limits.shrink_block(128)
    assert limits.scored_tokens == 30_000
    assert limits.shrink_block(1000)
    assert limits.scored_tokens == 500
