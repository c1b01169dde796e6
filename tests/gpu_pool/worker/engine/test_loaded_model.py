"""What is asked of a model in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from chunks import generating
from engine_probes import fresh, never

from gpu_pool.worker.engine import tree_generation
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.slots import Slots


@pytest.mark.parametrize(("name", "route"), [("llama", "tree"), ("mamba", "plain")])
def test_description_says_which_route_and_why(name, route, checkpoint, load):
    loaded = load(checkpoint(name))
    expected = f" M parameters, float32, {loaded.attn_implementation} attention; {route} route: {loaded.route[1]}"
    assert loaded.describe().endswith(expected)


@torch.inference_mode()
def test_logits_of_some_positions_are_those_of_all(checkpoint, load):
    loaded = load(checkpoint("llama"))
    whole = dataclasses.replace(loaded, forward_names=loaded.forward_names - {"logits_to_keep"})
    assert loaded.narrows_logits
    assert not whole.narrows_logits
    ids, positions = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]), torch.tensor([1, 3])
    expected = loaded.model(input_ids=ids).logits[:, positions]
    for model in (loaded, whole):
        torch.testing.assert_close(model.logits(ids, positions), expected)


def test_rows_continued_at_once_are_bounded_by_their_keys_and_values(checkpoint, load):
    """Each holds keys and values [2 heads, 8] of 2 layers, 4 bytes a number, for all tokens that it may come to."""
    loaded = load(checkpoint("llama"))
    token_bytes = 2 * 2 * 2 * 8 * 4
    row_bytes = 50 * token_bytes
    for held_bytes, rows in ((3 * row_bytes, 3), (3 * row_bytes - 1, 2), (0, 1)):
        assert fresh(loaded, held_bytes=held_bytes).generated_rows(50) == rows
    beside = fresh(loaded, held_bytes=3 * row_bytes + 7 * token_bytes)
    assert [beside.generated_rows(50, in_blocks) for in_blocks in (0, 7, 8, 1000)] == [3, 3, 2, 1]
    assert fresh(loaded, generated_rows=5).generated_rows(50) == 5


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma3n_text", "gemma4_text"])
def test_rows_hold_what_is_taken_for_them(name, checkpoint, load):
    """Latent attention, layers with heads of other sizes, layers that share theirs: by the memory of real slots."""
    loaded = load(checkpoint(name))
    with watched_slots() as made:
        generate(fresh(loaded), generating([range(5, 63)], max_gen_toks=6), never)
    [slots] = made
    tensors = [tensor for pair in slots._buffers.values() for tensor in pair]
    assert {tensor.shape[0] for tensor in tensors} == {1}
    row_bytes = sum(tensor.nbytes for tensor in tensors) * (58 + 6) // tensors[0].shape[2]
    assert fresh(loaded, held_bytes=2 * row_bytes).generated_rows(58 + 6) == 2
    assert fresh(loaded, held_bytes=2 * row_bytes - 1).generated_rows(58 + 6) == 1


@contextmanager
def watched_slots() -> Iterator[list[Slots]]:
    """The slots that are made meanwhile."""
    made: list[Slots] = []

    def make(most: int, device: torch.device) -> Slots:
        made.append(Slots(most, device))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_generation, "Slots", make)
        yield made


@pytest.mark.parametrize("token", [-1, 100_000])
def test_tokens_of_another_vocabulary_are_refused(token, checkpoint, load):
    loaded = load(checkpoint("llama"))
    loaded.check_tokens([(0, loaded.vocabulary - 1), ()])
    with pytest.raises(ValueError, match="token ids must lie in"):
        loaded.check_tokens([(5,), (6, token)])
