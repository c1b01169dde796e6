# pyright: basic
"""How much a forward pass may hold on this device, from the memory that the loaded model has left free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from gpu_pool.machine_memory import available_bytes
from gpu_pool.model_size import PROCESS_BYTES, SCORED_POSITIONS, activation_bytes
from gpu_pool.worker.engine.configs import largest, text_config
from gpu_pool.worker.engine.shortage import is_out_of_memory

_LEAST_TOKENS = 128
_CALM_CHUNKS = 100
"""Chunks, or streams of them, without a shortage after which bounds that had shrunk double."""


@dataclass(kw_only=True)
class Limits:
    """Bounds of forward passes. Those that memory did not suffice for shrink, and grow back when it does for long."""

    scored_tokens: int
    """Tokens of a forward pass, where the request leaves the batch size to us; of the plain way padded ones."""
    worthwhile_tokens: int
    """Padded tokens from which on a forward pass uses the device well: a larger one should not grow by padding."""
    generated_tokens: int
    """Padded tokens, prompt and continuation, that are held while generating the plain way."""
    generated_rows: int
    """Sequences generated at once."""
    held_bytes: int
    """Memory of the keys and values that work along the token tree holds: those of sequences that are continued, in
    slots and in blocks; while scoring those of blocks that are looked back at. One path of these it takes anyway."""
    logits_bytes: int
    """Memory of the logits of one forward pass, in fp32; always."""
    prefix_bytes: int
    """Memory of the keys and values of shared beginnings, kept between chunks, whatever their blocks."""

    planned: dict[str, int] = field(init=False, repr=False, compare=False)
    """What those that may shrink were at first, and are at most, by their names."""
    _calm: int = field(default=0, init=False, repr=False, compare=False)
    """Chunks since the latest shortage, or since they grew."""

    def __post_init__(self) -> None:
        self.planned = self._shrinking()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """While a chunk is computed. What is learnt from shortages stays, but not if the chunk fails of one: then
        others held the memory, or a request is too large, which no bound helps."""
        before = self._shrinking()
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                vars(self).update(before)
                self._calm = 0
            raise
        self._calm = self._calm + 1 if self._shrinking() == before else 0
        if self._calm == _CALM_CHUNKS:
            self._calm = 0
            for name, planned in self.planned.items():
                setattr(self, name, min(planned, 2 * getattr(self, name)))

    def _shrinking(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("scored_tokens", "generated_tokens", "held_bytes")}

    def scored_positions(self, vocabulary: int, *, deterministic: bool = False) -> int:
        """Positions of a forward pass whose logits may be asked for, at least one.

        `deterministic`: whatever this worker's memory; each is placed where it has room for so many.
        """
        return SCORED_POSITIONS if deterministic else max(1, self.logits_bytes // (4 * vocabulary))

    def shrink(self, tokens: int) -> None:
        """So many tokens of a forward pass were too many."""
        self.scored_tokens = min(self.scored_tokens, max(_LEAST_TOKENS, tokens // 2))

    def shrink_block(self, tokens: int) -> bool:
        """A block of so many tokens was too much alone: those laid out from now on have half as many.

        False: it is as small as blocks get.
        """
        if tokens <= _LEAST_TOKENS:
            return False
        self.shrink(tokens)
        return True

    def shrink_generated(self, tokens: int) -> None:
        """So many tokens held while generating the plain way were too many."""
        self.generated_tokens = min(self.generated_tokens, max(_LEAST_TOKENS, tokens // 2))


_MOST = {
    "cpu": Limits(
        scored_tokens=1024,  # more does not make a product faster, and its activations leave the cache
        worthwhile_tokens=128,
        generated_tokens=8192,
        generated_rows=64,
        held_bytes=4 << 30,
        logits_bytes=1 << 30,
        prefix_bytes=1 << 30,
    ),
    "cuda": Limits(
        scored_tokens=32768,
        worthwhile_tokens=4096,
        generated_tokens=65536,
        generated_rows=256,
        held_bytes=64 << 30,
        logits_bytes=8 << 30,
        prefix_bytes=16 << 30,
    ),
}
_SHARES = {"held_bytes": 0.4, "logits_bytes": 0.1, "prefix_bytes": 0.1, "activations": 0.2}
"""Of the free memory; the rest is left to fragmentation and what libraries take."""


def find_limits(model: Any, device: torch.device, budget: int = 0) -> Limits:
    """Limits of `model`, whose weights are loaded; `budget` as in `free_bytes`."""
    most = _MOST["cuda" if device.type == "cuda" else "cpu"]
    free = free_bytes(device, budget)
    fitting = int(free * _SHARES["activations"]) // _activation_bytes(model)
    return Limits(
        scored_tokens=max(_LEAST_TOKENS, min(most.scored_tokens, fitting)),
        worthwhile_tokens=most.worthwhile_tokens,
        generated_tokens=most.generated_tokens,
        generated_rows=most.generated_rows,
        held_bytes=min(most.held_bytes, int(free * _SHARES["held_bytes"])),
        logits_bytes=min(most.logits_bytes, int(free * _SHARES["logits_bytes"])),
        prefix_bytes=min(most.prefix_bytes, int(free * _SHARES["prefix_bytes"])),
    )


def _activation_bytes(model: Any) -> int:
    """Memory of a token's activations in the widest part of a layer."""
    config = text_config(model.config)
    hidden = largest(config, "hidden_size") or model.get_input_embeddings().weight.shape[-1]
    inner = largest(config, "intermediate_size", "n_inner", "ffn_dim", "d_ff")
    experts = largest(config, "num_experts_per_tok") or 1
    return activation_bytes(hidden, inner, experts, model.dtype.itemsize)


def confine(budget: int) -> None:
    """Let this process take at most `budget` bytes of each GPU that it will use, the CUDA context among them."""
    sharded = torch.distributed.is_initialized()  # then a rank has a GPU of its own
    for index in [torch.cuda.current_device()] if sharded else range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        fraction = max(0, budget - PROCESS_BYTES["cuda"]) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction), index)


def free_bytes(device: torch.device, budget: int = 0) -> int:
    """Free memory, where this process may hold `budget` bytes (0: any number) what is left of them at most.

    Of ranks that share a model, what the one with the least has, because all must do the same.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if budget:
        free = min(free, max(0, budget - _held_bytes(device)))
    if not torch.distributed.is_initialized():
        return free
    least = torch.tensor(free, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)


def _held_bytes(device: torch.device) -> int:
    """What this process holds of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) + PROCESS_BYTES["cuda"]
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
