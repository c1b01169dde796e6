"""What a workload takes at least: the arithmetic that perfect sharing would leave, on this machine's measured peaks.

Scored and read tokens: each distinct token (of the token trie of all requests) once through the layers, each distinct
scored position once through the head, in FLOPs over the peak of a large matrix product:

    2 · (weights of the layers) · tokens + 2 · (weights of the head) · positions
    + 4 · layers · heads · (dimension of a head) · Σ (positions that a token attends to, itself included)

Written tokens: all sequences go on at once, a token each step, until each is as long as it became. A step takes the
larger of two times: its FLOPs (as above) over the matrix peak, and the bytes that it must read over the memory
bandwidth of a large copy:

    (weights of the layers and the head, once) + (keys and values of the distinct tokens of the prompts that still go
    on, a shared prefix once, and of the tokens that each of them has written so far)

The first written token comes with the prompt. A dense model is assumed: each token takes all weights. Where weights fit
into the processor's cache, the bandwidth of memory is no limit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_pool.evaluator.requests import Unit
from gpu_pool.worker.engine.blocks import Tokens, common_prefix
from gpu_pool.worker.engine.cpu_layers import is_usable, laid_out_for_one_sum

FORMULA = (
    "scoring and prompts: FLOPs with perfect sharing / matrix peak; decoding: for each step of all sequences together "
    "max(FLOPs / matrix peak, (weights once + keys and values of distinct prompt tokens and own tokens) / bandwidth)"
)
_COPIED_BYTES = 256 * 1024**2
_TRIES = 6


@dataclass(frozen=True)
class Peaks:
    """Of one CPU second on these threads."""

    flops: float
    """Of a large matrix product in the model's dtype."""
    bandwidth: float
    """Bytes read and written by a large copy."""


def measure_peaks(dtype: torch.dtype) -> Peaks:
    """The best of six of each; of a product, with its right side laid out beforehand where that can be had."""
    matrix = torch.randn(2048, 2048).to(dtype)
    product = laid_out_for_one_sum(matrix, None) if is_usable(dtype) else matrix.matmul
    source = torch.ones(_COPIED_BYTES // 4)
    target = torch.zeros_like(source)
    products, copies = [], []
    for _ in range(_TRIES):
        started = time.process_time()
        product(matrix)
        products.append(time.process_time() - started)
        started = time.process_time()
        target.copy_(source)
        copies.append(time.process_time() - started)
    return Peaks(2 * 2048**3 / min(products), 2 * _COPIED_BYTES / min(copies))


@dataclass(frozen=True)
class Costs:
    """What one model's parts take."""

    token: int
    """FLOPs of a token in the layers, without attention's own."""
    position: int
    """FLOPs of a position in the head."""
    look: int
    """FLOPs of a token for each position that it attends to."""
    weights: int
    """Bytes of the layers and the head."""
    keys_and_values: int
    """Bytes of a token."""

    @classmethod
    def of(cls, model: Any) -> Costs:
        """Of a state-space model, which attends to nothing, the products alone: its recurrence is not counted."""
        config = model.config
        head = model.get_output_embeddings().weight.numel()
        layers = sum(p.numel() for p in model.base_model.parameters()) - model.get_input_embeddings().weight.numel()
        heads = getattr(config, "num_attention_heads", 0)
        dimension = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        size = model.dtype.itemsize
        return cls(
            token=2 * layers,
            position=2 * head,
            look=4 * config.num_hidden_layers * heads * dimension,
            weights=(layers + head) * size,
            keys_and_values=2 * config.num_hidden_layers * key_heads * dimension * size,
        )


@dataclass(frozen=True)
class Step:
    """What a step of decoding takes: all sequences that still go on, one token each."""

    flops: int
    read: int
    """Bytes."""

    def seconds(self, peaks: Peaks) -> float:
        return max(self.flops / peaks.flops, self.read / peaks.bandwidth)

    def waits_for_memory(self, peaks: Peaks) -> bool:
        return self.read / peaks.bandwidth > self.flops / peaks.flops


@dataclass(frozen=True)
class Work:
    """What a workload takes with perfect sharing."""

    flops: int
    """Of all tokens that are read or scored."""
    steps: Sequence[Step] = ()

    def seconds(self, peaks: Peaks) -> float:
        """CPU seconds at least."""
        return self.flops / peaks.flops + sum(step.seconds(peaks) for step in self.steps)


def work_of(costs: Costs, units: set[Unit], written: Mapping[Tokens, int]) -> Work:
    """What the distinct `units` take; `written` has the number of tokens that each prompt to be continued got."""
    inputs = sorted({tokens_of(unit) if unit.options else tokens_of(unit)[:-1] for unit in units})
    scored = {
        tokens_of(unit)[:end]
        for unit in units
        for end in range(len(unit.prompt), len(unit.prompt) + (1 if unit.options else len(unit.continuation)))
    }
    tokens, looks = _trie(inputs)
    flops = costs.token * tokens + costs.position * len(scored) + costs.look * looks
    return Work(flops, _steps(costs, written))


def tokens_of(unit: Unit) -> Tokens:
    return (*map(int, unit.prompt), *map(int, unit.continuation))


def _trie(sequences: Sequence[Tokens]) -> tuple[int, int]:
    """(distinct tokens, positions that they attend to) of sorted `sequences`."""
    tokens = looks = 0
    for before, sequence in zip([(), *sequences], sequences, strict=False):
        same, size = common_prefix(before, sequence), len(sequence)
        tokens += size - same
        looks += (size * (size + 1) - same * (same + 1)) // 2
    return tokens, looks


def _steps(costs: Costs, written: Mapping[Tokens, int]) -> list[Step]:
    """Step n feeds the n-th written token of each sequence that has more than n."""
    steps: list[Step] = []
    active, distinct = sorted(written), 0
    for step in range(1, max(written.values(), default=0)):
        going_on = [prompt for prompt in active if written[prompt] > step]
        if step == 1 or len(going_on) < len(active):
            active, distinct = going_on, _trie(going_on)[0]
        looks = sum(len(prompt) + step for prompt in active)
        flops = (costs.token + costs.position) * len(active) + costs.look * looks
        read = costs.weights + costs.keys_and_values * (distinct + step * len(active))
        steps.append(Step(flops, read))
    return steps
