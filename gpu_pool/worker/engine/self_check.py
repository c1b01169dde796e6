# pyright: basic
"""Computes a small token tree both ways, along the tree and plainly, and how far rounding alone sends them apart.

Rounding is measured on the model itself, for there is no other way to tell a deep one's noise from a small mistake: its
tree is computed once more with every result of attention moved by one step of its type. What two correct ways differ
by came out at 0.2 to 2.6 times what that changes, over 2 to 24 layers of 20 architectures with random weights in fp32,
bf16 and fp16, and at 0.8 times for SmolLM2; single trees of deep mixtures aside. A mistake that changes less than
rounding does cannot be seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from gpu_pool.worker.engine.attention import NAME, packed_attention
from gpu_pool.worker.engine.batching import run_halving
from gpu_pool.worker.engine.blocks import Block, Tokens
from gpu_pool.worker.engine.configs import largest_window
from gpu_pool.worker.engine.packed import attempting, finish, hold, packed_attention_in, release, run_blocks, run_step
from gpu_pool.worker.engine.padding import pad_right
from gpu_pool.worker.engine.rope import rope_boundary, scaled_from
from gpu_pool.worker.engine.slots import Slots
from gpu_pool.worker.engine.token_tree import lay_out

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

_NUDGED = "evalpool_nudged"
"""In transformers' table of attention implementations: packed attention whose results are nudged."""
_LONG, _SHORT, _BRANCH = 48, 24, 12
"""Tokens of the two beginnings, where no window asks for more, and of the branches after them."""
_WIDEST_ON_CPU = 4096
"""Tokens of a window that a CPU goes beyond: passes over more, of billions of parameters, would take hours."""
_TREES = 3
"""Compared at most."""
_NOISE_FACTOR = 4
"""Of the noise that was measured: it differs from token to token."""
_LEAST = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Share of the logits' spread that is always allowed: in half precision a few steps of the type at the size of a logit,
in fp32 what long products differ by when they are summed in another order."""
_MOST = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Share of the spread beyond which it is no rounding, however noisy the model: as padding's probe has it."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the self-check found: distances between logits."""

    difference: float
    """Between the two ways."""
    company: float
    """Between a sequence alone and in a padded batch, both the plain way."""
    rounding: float
    """Between the tree and the tree with nudged attention."""
    least: float
    most: float
    """Bounds of what is allowed as rounding, whatever noise was measured."""

    @property
    def allowed(self) -> float:
        """How far apart rounding may send the two ways."""
        return min(max(_NOISE_FACTOR * max(self.company, self.rounding), self.least), self.most)


def compare_trees(loaded: LoadedModel) -> Comparison:
    """The first comparison that is right, of several trees where rounding could explain the difference.

    It may send an early token of a mixture to another expert, and with it all tokens that look back at it; not in every
    tree. What the tree route gets wrong it gets wrong in all of them.

    Raises:
        torch.OutOfMemoryError: a single sequence or block needs more memory than there is.
    """
    found = compare(loaded)
    for attempt in range(1, _TREES):
        if not found.allowed < found.difference <= found.most:
            break
        found = compare(loaded, attempt)
    return found


@torch.inference_mode()
def compare(loaded: LoadedModel, attempt: int = 0) -> Comparison:
    """Compare the ways on two beginnings with two branches each, of which one is longer than every window that counts.

    Where positions are scaled from some position on (`rope.scaled_from`: thousands of tokens), the short beginning is
    compared around that position as well, both ways being told where it begins. What this cannot find, because only
    sequences as long as that would show it, is a model that counts tokens itself instead of using what it is told.

    Raises:
        torch.OutOfMemoryError: a single sequence or block needs more memory than there is.
    """
    sequences = check_sequences(loaded, attempt)
    short = [index for index, tokens in enumerate(sequences) if len(tokens) < _SHORT + _BRANCH]
    few = [sequences[index] for index in short]
    expected = [_plain_logits(loaded, tokens) for tokens in sequences]
    found = _tree_logits(loaded, sequences)
    difference = _apart(loaded, found, expected)
    for position in scaled_from(loaded):
        offset = max(min(position + _BRANCH, loaded.max_length) - len(few[0]), 0)
        there = [_plain_logits(loaded, tokens, offset) for tokens in few]
        difference = max(difference, _apart(loaded, _tree_logits(loaded, few, offset), there))
    company = _logits_in_company(loaded, few, max(sequences, key=len)[: _LONG + _BRANCH])
    nudged = _tree_logits(loaded, few, implementation=_NUDGED)
    spread = max(map(_spread, expected))
    return Comparison(
        difference=difference,
        company=_apart(loaded, company, [expected[index] for index in short]),
        rounding=_apart(loaded, nudged, [found[index] for index in short]),
        least=_LEAST[loaded.model.dtype] * spread,
        most=_MOST[loaded.model.dtype] * spread,
    )


def check_sequences(loaded: LoadedModel, attempt: int = 0) -> list[Tokens]:
    """A long beginning with two branches, and a short one with two; sorted: those of a beginning are neighbours.

    The long one goes beyond every window that is reached by what goes along the tree, as far as the model goes: that is
    nothing beyond a length at which rotary frequencies change, and beyond a window that is too wide to check.
    """
    size = loaded.vocabulary

    def tokens(count: int, factor: int) -> Tokens:
        return tuple((factor * index * index + 7 * index + factor) % size for index in range(count))

    longest, window = (rope_boundary(loaded) or loaded.max_length) - _BRANCH, largest_window(loaded.text_config)
    is_reached = window < longest and unchecked_window(loaded) is None
    length = max(min(window + _LONG if is_reached else _LONG, longest), 2)
    others = 16 * attempt
    beginnings = tokens(length, others + 3), tokens(min(_SHORT, length) - 1, others + 5)
    branches = tokens(_BRANCH, others + 11), tokens(_BRANCH, others + 13)
    return sorted({beginning + branch for beginning in beginnings for branch in branches})


def unchecked_window(loaded: LoadedModel) -> int | None:
    """The window beyond which nothing is compared, for want of time; None where there is no such window."""
    window = largest_window(loaded.text_config)
    return window if loaded.device.type == "cpu" and _WIDEST_ON_CPU < window < loaded.max_length else None


def _apart(loaded: LoadedModel, some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """How far sequences' logits [_BRANCH, vocabulary] are apart.

    In half precision as the median over tokens: rounding sends single ones of a mixture to other experts, which says
    nothing about the rest. It is taken of each sequence's tokens that are read, and of the last ones, which are
    continued, of the two sequences of a beginning (the lesser of two): what is wrong for some of these only must show.
    """
    by_token = [_distances(one, other) for one, other in zip(some, others, strict=True)]
    if loaded.model.dtype.itemsize > 2:
        return max(float(distances.max()) for distances in by_token)
    read = [distances[:-1] for distances in by_token]
    continued = [torch.stack([one[-1], other[-1]]) for one, other in zip(by_token[::2], by_token[1::2], strict=True)]
    return max(float(distances.median()) for distances in (*read, *continued))


def _distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The largest difference of each token's logits; equal infinities are none."""
    return torch.where(one == other, 0.0, (one - other).abs()).nan_to_num(nan=math.inf).amax(-1)


def _spread(logits: torch.Tensor) -> float:
    """Between the largest and the smallest; tokens that a model rules out do not count."""
    told = logits[logits.isfinite()]
    return float(told.max() - told.min()) if len(told) else 0.0


def _plain_logits(loaded: LoadedModel, tokens: Tokens, offset: int = 0) -> torch.Tensor:
    """Logits [_BRANCH, vocabulary] after the last tokens, the first of all being at position `offset`."""
    ids = pad_right([tokens], loaded.device)
    last = torch.arange(len(tokens) - _BRANCH, len(tokens), device=loaded.device)
    if not offset:
        return loaded.logits(ids, last)[0].float()
    positions = torch.arange(offset, offset + len(tokens), device=loaded.device)
    output = loaded.model(input_ids=ids, position_ids=positions[None], use_cache=False, logits_to_keep=last)
    return output.logits[0].float()


def _logits_in_company(loaded: LoadedModel, sequences: Sequence[Tokens], longer: Tokens) -> list[torch.Tensor]:
    """What `_plain_logits` gives of each, padded to the length of another; in smaller batches for lack of memory."""

    def run(batch: list[Tokens]) -> list[torch.Tensor]:
        ids = pad_right(batch, loaded.device)
        first = min(map(len, batch)) - _BRANCH
        logits = loaded.logits(ids, torch.arange(first, ids.shape[1], device=loaded.device)).float()
        ends = [len(tokens) - first for tokens in batch]
        return [row[end - _BRANCH : end] for row, end in zip(logits, ends, strict=True)]

    return run_halving(run, [*sequences, longer])[:-1]


def _tree_logits(
    loaded: LoadedModel, sequences: Sequence[Tokens], offset: int = 0, implementation: str = NAME
) -> list[torch.Tensor]:
    """Logits [_BRANCH, vocabulary] after each one's last tokens: read in two batches, the very last token continued.

    In smaller batches where memory does not suffice. `offset` as in `_plain_logits`.
    """
    first = [len(tokens) - _BRANCH for tokens in sequences]
    layout = lay_out(sequences, first, longest_block=max(map(len, sequences)))
    for block in layout.blocks:
        block.start += offset
    paths = [path.until(path.end - 1) for path in layout.paths]
    for path in paths:
        hold(path)
    middle, logits = len(layout.blocks) // 2, {}

    def read_blocks(blocks: list[Block]) -> list[None]:
        wanted = [(block, index) for block in blocks for index in range(len(block.tokens))]
        with attempting(blocks):
            logits.update(zip(wanted, run_blocks(loaded.model, blocks, wanted).float(), strict=True))
        finish(blocks)
        return []

    with packed_attention_in(loaded.model, implementation):
        for blocks in (layout.blocks[:middle], layout.blocks[middle:]):  # the second looks back at what was kept
            run_halving(read_blocks, list(blocks))
        slots = Slots(len(sequences), loaded.device)
        for path, start in zip(paths, first, strict=True):
            slots.add(path, offset + start // 2)
        last = run_step(loaded.model, slots, [tokens[-1] for tokens in sequences]).float()
    for path in paths:
        release(path.sources)
    read = [
        [logits[place] for place in path.locate(offset + start, path.end)]
        for path, start in zip(paths, first, strict=True)
    ]
    return [torch.stack([*rows, end]) for rows, end in zip(read, last, strict=True)]


def _nudged_attention(*args: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Packed attention whose results are moved by a step of their type, up and down in turns."""
    result, weights = packed_attention(*args, **options)
    step = torch.finfo(result.dtype).eps
    result[..., ::2] *= 1 + step
    result[..., 1::2] *= 1 - step
    return result, weights


AttentionInterface.register(_NUDGED, _nudged_attention)
