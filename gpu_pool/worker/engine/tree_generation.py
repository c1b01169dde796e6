# pyright: basic
"""Continuous batching: prompts are read along their token tree, and continued side by side, each leaving when it ends.

A step continues every row by one token. Rows that end make room for prompts that wait. What prompts begin with in
common is computed once; where that spares enough it stays in the tree's blocks, where all their rows attend to it, and
otherwise it is copied into the slots (`sharing`). Blocks and slots are held in one memory (`Limits.held_bytes`):
there are as many slots as leave room for the longest prompt in blocks, and prompts are read as blocks are let go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from gpu_pool.chunk_messages import GenerationOptions
from gpu_pool.worker.engine.block_queue import BlockQueue
from gpu_pool.worker.engine.blocks import Block, BlockPath
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.choosing import Chooser, ChosenRow
from gpu_pool.worker.engine.holdings import Holdings
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.packed import packed_attention_in, run_blocks, run_step
from gpu_pool.worker.engine.prefix_cache import Beginning, release_all
from gpu_pool.worker.engine.prompts import Prompt
from gpu_pool.worker.engine.sharing import shared_lengths
from gpu_pool.worker.engine.shortage import is_out_of_memory
from gpu_pool.worker.engine.slots import Slots
from gpu_pool.worker.engine.stopping import StopFinder, finish_text
from gpu_pool.worker.engine.token_tree import Room, plan

_WORTHWHILE_PREFILL = 128
"""Tokens of waiting prompts that are worth a forward pass of their own while others are continued."""
_IDLE_SHARE = 0.25
"""Share of the slots that are not left free for lack of so many tokens."""


@dataclass(eq=False, slots=True)
class _DistinctPrompt:
    """A distinct prompt and everyone who wants it continued."""

    path: BlockPath
    shared: int
    """Its first tokens that stay in the tree's blocks."""
    prompts: list[Prompt]


@dataclass(eq=False, slots=True)
class _RunningPrompt:
    """One prompt that is being continued."""

    prompt: Prompt
    path: BlockPath
    """What it shares, held until it ends."""
    chosen: ChosenRow
    tokens: list[int] = field(default_factory=list)


def continue_rows(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    chooser: Chooser,
    most_rows: int,
    should_stop: Callable[[], bool],
    more: Callable[[], Sequence[Prompt]] = tuple,
    *,
    deterministic: bool = False,
) -> Iterator[tuple[Prompt, str]]:
    """Each prompt and its text, as it ends; `should_stop` is asked at every step.

    `more` is asked for prompts that join the others whenever slots are free and none are left to read.
    `deterministic`: read in blocks of a fixed grid, and continued alone when `most_rows` is 1.

    Raises:
        Cancelled: `should_stop` said so.
        torch.OutOfMemoryError: there is not enough memory for so many rows.
    """
    run = _ContinuousBatch(loaded, options, chooser, most_rows, more, deterministic)
    with packed_attention_in(loaded.model), torch.inference_mode():
        try:
            run.admit(prompts)
            while run.step():
                yield from run.take_texts()
                if should_stop():
                    raise Cancelled
            yield from run.take_texts()
        except BaseException:
            run.let_go()
            raise
    run.remember()


class _ContinuousBatch:
    """Prompts on their way."""

    def __init__(
        self,
        loaded: LoadedModel,
        options: GenerationOptions,
        chooser: Chooser,
        most_rows: int,
        more: Callable[[], Sequence[Prompt]],
        deterministic: bool,
    ) -> None:
        self._loaded = loaded
        self._options = options
        self._chooser = chooser
        self._stop = StopFinder(loaded.tokenizer, options.until)
        self._take_prompts = more
        self._deterministic = deterministic
        self._texts: list[tuple[Prompt, str]] = []
        self._cache = loaded.grid_cache if deterministic else loaded.prefix_cache
        self._reserved: list[Beginning] = []
        self._blocks = BlockQueue()
        self._ending: dict[Block, list[_DistinctPrompt]] = {}
        """Prompts by the block that holds their last token."""
        self._holdings = Holdings()
        self._unstarted: set[_DistinctPrompt] = set()
        """Prompts that are held as a whole, until the last one's row is started."""
        self._waiting: deque[tuple[_DistinctPrompt, Prompt, torch.Tensor]] = deque()
        """Prompts that have been read: with the logits after their last token."""
        self._rows: list[_RunningPrompt] = []
        self._slots = Slots(most_rows, loaded.device)
        self._longest = 0
        """Tokens of its own that any row had when it started."""
        self._most_in_blocks = 0
        """Tokens that any prompt needs in blocks before it starts, and those of a pass that is worth its while."""

    def admit(self, prompts: Sequence[Prompt]) -> None:
        """Take these prompts in, when all blocks of those before them have been read."""
        self.remember()
        by_tokens: dict[tuple[int, ...], list[Prompt]] = {}
        for prompt in prompts:
            by_tokens.setdefault(prompt.tokens, []).append(prompt)
        sequences = sorted(by_tokens)
        prompts_of = [by_tokens[tokens] for tokens in sequences]
        last = [len(tokens) - 1 for tokens in sequences]
        known = [(tokens, path) for tokens, path, _ in self._cache.find(sequences)]
        layout = plan(sequences, last, self._loaded.room(self._free), known, deterministic=self._deterministic)
        self._reserved = self._cache.reserve(layout, sequences, sequences.index(prompts[-1].tokens))
        for beginning in self._reserved:
            self._holdings.hold(beginning.path)
        self._blocks.add(layout.blocks)
        shared = [0] * len(sequences)
        if not self._deterministic:
            shared = shared_lengths(layout.paths, list(map(len, prompts_of)))
        own = (path.end - length for path, length in zip(layout.paths, shared, strict=True))
        self._longest = max(self._longest, *own)
        in_blocks = max(path.end for path in layout.paths) + self._loaded.limits.worthwhile_tokens
        self._most_in_blocks = max(self._most_in_blocks, in_blocks)
        self._slots.longest = self._longest + self._options.max_gen_toks
        fitting = self._loaded.generated_rows(self._slots.longest, self._most_in_blocks)
        self._slots.most = min(self._slots.most, fitting)
        for path, length, some in zip(layout.paths, shared, prompts_of, strict=True):
            sequence = _DistinctPrompt(path, length, some)
            self._holdings.hold(path)
            self._unstarted.add(sequence)
            self._ending.setdefault(path.sources[-1].block, []).append(sequence)

    def step(self) -> bool:
        """Take in what has room, and continue every row by one token; False when nothing is left."""
        self._fill()
        if self._rows:
            self._continue()
        return bool(self._rows or self._waiting or self._blocks) or self._admit_more()

    def take_texts(self) -> list[tuple[Prompt, str]]:
        """Those that have ended since this was asked last."""
        texts, self._texts = self._texts, []
        return texts

    def remember(self) -> None:
        """Keep the beginnings that later prompts may have."""
        for beginning in self._reserved:
            self._holdings.release(beginning.path)
        self._cache.keep(self._reserved)
        self._reserved = []

    def let_go(self) -> None:
        """Free what is held, in the middle of everything."""
        for row in self._rows:
            self._holdings.release(row.path)
        for sequence in self._unstarted:
            self._holdings.release(sequence.path)
        self._blocks.let_go()
        for beginning in self._reserved:
            self._holdings.release(beginning.path)
        release_all(self._reserved)

    def _fill(self) -> None:
        """Start prompts that wait for a slot; read more of them when enough slots are free."""
        limits = self._loaded.limits
        self._start_waiting()
        if not self._blocks and not self._waiting and self._free >= _IDLE_SHARE * self._slots.most:
            self._admit_more()
        while self._blocks and not self._waiting and (batch := self._next_batch()):
            try:
                self._blocks.run(batch, self._read, limits)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    self._blocks.shrink_next(limits)
                raise
            self._start_waiting()

    def _admit_more(self) -> bool:
        if not (prompts := self._take_prompts()):
            return False
        self.admit(prompts)
        return True

    @property
    def _free(self) -> int:
        """Slots that no row has."""
        return max(0, self._slots.most - len(self._rows))

    def _next_batch(self) -> list[Block]:
        """Blocks to be read together, so that their prompts find a slot and they find memory; none while there is not
        enough of either, and rows are left to make room."""
        if not (free := self._free):
            return []
        room = self._loaded.room(free, self._free_bytes)
        batch = self._blocks.next_batch(self._cost, room, deterministic=self._deterministic)
        costs = [self._cost(block) for block in batch]
        if self._rows and sum(cost.bytes for cost in costs) > room.bytes:
            return []
        is_enough = sum(cost.tokens for cost in costs) >= _WORTHWHILE_PREFILL
        is_worthwhile = is_enough or free >= _IDLE_SHARE * self._slots.most
        return batch if is_worthwhile or len(batch) == len(self._blocks) else []

    @property
    def _free_bytes(self) -> int:
        """Memory for more blocks."""
        planned = self._slots.most * self._slots.longest * self._loaded.token_bytes
        return self._loaded.limits.held_bytes - max(planned, self._slots.bytes) - self._holdings.bytes

    def _cost(self, block: Block) -> Room:
        ending = self._ending.get(block, ())
        sequences = sum(len(sequence.prompts) for sequence in ending)
        return Room(len(block.tokens), len(ending), sequences, block.reach * self._loaded.token_bytes)

    def _read(self, batch: list[Block]) -> None:
        """Compute prompts' tokens; those that end here wait for a slot then."""
        ends = [(block, sequence) for block in batch for sequence in self._ending.get(block, ())]
        wanted = [(block, sequence.path.end - 1 - block.start) for block, sequence in ends]
        logits = run_blocks(self._loaded.model, batch, wanted)
        for row, (_, sequence) in zip(logits, ends, strict=True):
            self._waiting.extend((sequence, prompt, row) for prompt in sequence.prompts)
        self._holdings.add_computed(batch)
        for block in batch:
            self._ending.pop(block, None)

    def _start_waiting(self) -> None:
        starting = [self._waiting.popleft() for _ in range(min(self._free, len(self._waiting)))]
        if not starting:
            return
        rows: list[_RunningPrompt] = []
        for sequence, prompt, _ in starting:
            shared = sequence.path.until(sequence.shared)
            with self._learning():
                self._slots.add(sequence.path, sequence.shared)
            self._holdings.hold(shared)
            rows.append(_RunningPrompt(prompt, shared, self._chooser.start(prompt.tokens, prompt.seed)))
            self._rows.append(rows[-1])
        waiting = {sequence for sequence, _, _ in self._waiting}
        for sequence in {sequence for sequence, _, _ in starting} - waiting:
            self._unstarted.discard(sequence)
            self._holdings.release(sequence.path)
        self._append(rows, torch.stack([logits for _, _, logits in starting]))

    def _continue(self) -> None:
        """One more token for each row."""
        with self._learning():
            logits = run_step(self._loaded.model, self._slots, [row.tokens[-1] for row in self._rows])
        self._append(self._rows, logits)

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Remember when memory does not suffice for the slots: for all that they have room for, in use or not."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                self._loaded.shrink_generated_rows(self._slots.held, self._slots.longest, self._most_in_blocks)
            raise

    def _append(self, rows: Sequence[_RunningPrompt], logits: torch.Tensor) -> None:
        """Give each row its next token, and let go of those that end with it."""
        for row, token in zip(rows, self._chooser.choose(logits, [row.chosen for row in rows]), strict=True):
            row.tokens.append(token)
        for place in reversed(range(len(self._rows))):
            if self._is_finished(self._rows[place]):
                self._finish(place)

    def _is_finished(self, row: _RunningPrompt) -> bool:
        is_full = len(row.tokens) >= self._options.max_gen_toks
        return is_full or row.tokens[-1] in self._chooser.eos or self._stop.ends(row.tokens)

    def _finish(self, place: int) -> None:
        row = self._rows[place]
        self._slots.remove(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        self._holdings.release(row.path)
        loaded = self._loaded
        text = finish_text(row.tokens, loaded.tokenizer, self._stop.strings, loaded.think_end_token)
        self._texts.append((row.prompt, text))
