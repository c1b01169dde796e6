# pyright: basic
"""Runs batches of blocks through a model as one sequence of tokens, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch

from gpu_pool.worker.engine.attention import NAME, AttentionPlan, attending_by
from gpu_pool.worker.engine.blocks import Block, BlockPath
from gpu_pool.worker.engine.slots import Slots
from gpu_pool.worker.engine.transfer import to_device


@contextmanager
def packed_attention_in(model: Any, implementation: str = NAME) -> Iterator[None]:
    """Let `model`'s layers attend by plan meanwhile."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def run_blocks(model: Any, blocks: Sequence[Block], wanted: Sequence[tuple[Block, int]]) -> torch.Tensor:
    """Logits [len(wanted), vocabulary] after the tokens (block, index) of `wanted`, in order of the batch.

    Keys and values of blocks that somebody looks at later are kept on them.
    """
    device = model.get_input_embeddings().weight.device
    plan = AttentionPlan(blocks, device)
    tokens = np.fromiter(chain.from_iterable(block.tokens for block in blocks), np.int64, plan.size)
    places = np.fromiter((plan.starts[block] + index for block, index in wanted), np.int64, len(wanted))
    ids, positions, rows = to_device([tokens, plan.positions, places], device)
    with attending_by(plan):
        logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows).logits
    return logits[0]


@contextmanager
def attempting(blocks: Iterable[Block]) -> Iterator[None]:
    """Where it fails to compute these, nothing of them is kept: smaller attempts may need the memory."""
    try:
        yield
    except BaseException:
        for block in blocks:
            block.keys_values = None
        raise


def finish(blocks: Iterable[Block]) -> None:
    """These blocks need no longer be computed: nothing is kept for them. Once a block, however often it was tried."""
    for block in blocks:
        release(block.path.sources)


@torch.inference_mode()
def run_step(model: Any, slots: Slots, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [rows, vocabulary] after one more token for each of the `slots`."""
    positions = slots.next_positions()
    ids, rows = torch.tensor(tokens, device=positions.device), torch.arange(len(tokens), device=positions.device)
    with attending_by(slots):
        output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows)
    slots.advance()
    return output.logits[0]


def kept_bytes(block: Block) -> int:
    """Memory of the keys and values that are kept of a block."""
    return sum(tensor.nbytes for pair in (block.keys_values or {}).values() for tensor in pair)


def measure_token_bytes(model: Any) -> int:
    """Memory of one token's keys and values in all layers: of a block of one token, which is computed.

    Configs do not tell: heads and dimensions may differ between layers, and between keys and values.
    """
    block = Block(0, (0,), BlockPath(), users=1, reach=1)
    with packed_attention_in(model):
        run_blocks(model, [block], [(block, 0)])
    return kept_bytes(block)


def hold(path: BlockPath) -> None:
    """One user more of these blocks: their keys and values stay until it is released."""
    for block, length in path.sources:
        block.users += 1
        block.reach = max(block.reach, length)


def shorten(block: Block, length: int) -> None:
    """Keep the keys and values of a computed block's first `length` tokens only."""
    block.reach = length
    for layer, (keys, values) in block.keys_values.items():
        block.keys_values[layer] = keys[:, :length].clone(), values[:, :length].clone()


def release(sources: Sequence[tuple[Block, int]]) -> None:
    """One user of these blocks less; the last one's leaving frees their keys and values."""
    for block, _ in sources:
        block.users -= 1
        if not block.users:
            block.keys_values = None
