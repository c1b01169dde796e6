# pyright: basic
"""Continues prompts as lm-eval's HF backend does, with answers that do not depend on what else is in the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import msgspec
import torch

from gpu_pool.chunk_messages import GenerationChunk, GenerationOptions
from gpu_pool.worker.engine import plain_generation, tree_generation
from gpu_pool.worker.engine.choosing import CannotChoose, Chooser, make_chooser
from gpu_pool.worker.engine.cpu_layers import layers_for
from gpu_pool.worker.engine.encoder_decoder_generation import continue_prompts
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.prompts import Prompt
from gpu_pool.worker.engine.routes import Route
from gpu_pool.worker.engine.shortage import is_out_of_memory

logger = logging.getLogger(__name__)


class Texts(NamedTuple):
    """What a chunk's prompts go on with."""

    chunk_id: int
    texts: tuple[str, ...]
    """In request order."""
    plainly: str = ""
    """Why a model that goes along the token tree did not so for some of them."""


def generate(loaded: LoadedModel, chunk: GenerationChunk, should_stop: Callable[[], bool]) -> tuple[str, ...]:
    """The texts of one chunk alone; as `generate_chunks`."""
    [ended] = generate_chunks(loaded, chunk, should_stop, lambda: None)
    return ended.texts


def generate_chunks(
    loaded: LoadedModel,
    chunk: GenerationChunk,
    should_stop: Callable[[], bool],
    take_alike: Callable[[], GenerationChunk | None],
) -> Iterator[Texts]:
    """Each chunk's texts, as it ends: of `chunk` and of those that join it.

    `should_stop` is asked at every token. `take_alike` is asked for a chunk with the options of `chunk` whenever there
    is room for more prompts.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: a request that cannot be continued, or options that transformers refuses.
    """
    with layers_for(deterministic=chunk.deterministic):
        yield from _generate_chunks(loaded, chunk, should_stop, take_alike)


def _generate_chunks(
    loaded: LoadedModel,
    chunk: GenerationChunk,
    should_stop: Callable[[], bool],
    take_alike: Callable[[], GenerationChunk | None],
) -> Iterator[Texts]:
    following: GenerationChunk | None = chunk
    while following is not None:
        sequences = _check(loaded, following)
        if following.deterministic:
            following = msgspec.structs.replace(following, batch_size=1)
        plainly = ""
        if loaded.is_encoder_decoder:
            texts = continue_prompts(loaded, sequences, following, should_stop)
        else:
            prompts = _plan_prompts(loaded, following, sequences)
            chooser, along, plainly = _choose_way(loaded, prompts, following.options)
            taken = {prompt.index for prompt in along}
            others = [prompt for prompt in prompts if prompt.index not in taken]
            texts = plain_generation.generate_rows(loaded, others, following, should_stop) if others else {}
            if chooser and along:
                stream = _Stream(loaded, following, chooser, should_stop, take_alike, plainly)
                yield from stream.run(prompts, texts)
                following = stream.postponed
                continue
        yield Texts(following.chunk_id, tuple(texts[index] for index in range(len(sequences))), plainly)
        following = None


class _Stream:
    """Chunks that are continued together along the token tree."""

    def __init__(
        self,
        loaded: LoadedModel,
        first: GenerationChunk,
        chooser: Chooser,
        should_stop: Callable[[], bool],
        take_alike: Callable[[], GenerationChunk | None],
        plainly: str,
    ) -> None:
        """`plainly`: why some texts of the first chunk are known already."""
        self._loaded = loaded
        self._first = first
        self._chooser = chooser
        self._should_stop = should_stop
        self._take_alike = take_alike
        self._plainly = plainly
        self._prompts: dict[int, list[Prompt]] = {}
        """Of each chunk on its way."""
        self._texts: dict[int, dict[int, str]] = {}
        self._rows = 0
        self.postponed: GenerationChunk | None = None
        """One that was taken and could not join."""

    def run(self, prompts: list[Prompt], texts: dict[int, str]) -> Iterator[Texts]:
        """The first chunk, of which some `texts` may be known, and those that join it.

        With as many rows as memory allows, at most as many as asked for: half as many each time that it does not.
        """
        self._add(prompts, texts)
        most = self._loaded.limits.generated_rows
        self._rows = min(most, self._first.batch_size or most)
        while left := self._left():
            tried = self._loaded.limits.scored_tokens
            try:
                yield from self._continue(left)
                return
            except RuntimeError as error:
                is_least = self._rows == 1 and self._loaded.limits.scored_tokens >= tried
                if not is_out_of_memory(error) or (is_least and not len(self._loaded.prefix_cache)):
                    raise
            self._loaded.prefix_cache.clear()
            torch.cuda.empty_cache()  # outside the handler, whose traceback holds the failed attempt's tensors
            self._rows = max(1, self._rows // 2)

    def _continue(self, prompts: Sequence[Prompt]) -> Iterator[Texts]:
        ended = tree_generation.continue_rows(
            self._loaded,
            prompts,
            self._first.options,
            self._chooser,
            self._rows,
            self._should_stop,
            self._more,
            deterministic=self._first.deterministic,
        )
        for prompt, text in ended:
            texts = self._texts[prompt.chunk_id]
            texts[prompt.index] = text
            if len(texts) == len(self._prompts[prompt.chunk_id]):
                del self._prompts[prompt.chunk_id], self._texts[prompt.chunk_id]
                plainly = self._plainly if prompt.chunk_id == self._first.chunk_id else ""
                yield Texts(prompt.chunk_id, tuple(texts[index] for index in range(len(texts))), plainly)

    def _more(self) -> Sequence[Prompt]:
        """The prompts of another chunk, if there is one and it can be continued beside the others."""
        if self.postponed is not None or self._first.deterministic or (chunk := self._take_alike()) is None:
            return ()
        self.postponed = chunk
        try:
            prompts = _plan_prompts(self._loaded, chunk, _check(self._loaded, chunk))
        except ValueError:  # it fails alone, when the others have ended
            return ()
        if len(_along_tree(self._loaded, prompts, chunk.options)) < len(prompts):
            return ()
        self.postponed = None
        self._add(prompts, {})
        return prompts

    def _add(self, prompts: list[Prompt], texts: dict[int, str]) -> None:
        chunk_id = prompts[0].chunk_id
        self._prompts[chunk_id], self._texts[chunk_id] = prompts, texts

    def _left(self) -> list[Prompt]:
        """Prompts without a text."""
        every = chain.from_iterable(self._prompts.values())
        return [prompt for prompt in every if prompt.index not in self._texts[prompt.chunk_id]]


def _check(loaded: LoadedModel, chunk: GenerationChunk) -> list[tuple[int, ...]]:
    sequences = list(map(tuple, chunk.prompts.unpack()))
    loaded.check_tokens(sequences)
    return sequences


def _choose_way(
    loaded: LoadedModel, prompts: Sequence[Prompt], options: GenerationOptions
) -> tuple[Chooser | None, list[Prompt], str]:
    """What chooses tokens along the tree, the prompts that go there, and why the others do not, told once in the log.

    Nothing is told where the model does not, which is told when it is loaded.
    """
    if loaded.route[0] is Route.PLAIN:
        return None, [], ""
    chooser, along, plainly = None, list[Prompt](), ""
    try:
        chooser = make_chooser(loaded.base_model, options)
        along = _along_tree(loaded, prompts, options)
        if len(along) < len(prompts) and (boundary := loaded.tree_boundary) is not None:
            plainly = boundary.reason
    except CannotChoose as error:
        plainly = str(error)
    if plainly:
        loaded.tell_plain("some texts", plainly)
    return chooser, along, plainly


def _along_tree(loaded: LoadedModel, prompts: Sequence[Prompt], options: GenerationOptions) -> list[Prompt]:
    return [prompt for prompt in prompts if loaded.goes_along_tree(len(prompt.tokens) + options.max_gen_toks)]


def _plan_prompts(loaded: LoadedModel, chunk: GenerationChunk, sequences: Sequence[tuple[int, ...]]) -> list[Prompt]:
    """Prompts cut on the left so that the new tokens fit; an empty prompt starts from the prefix token."""
    room = loaded.max_length - chunk.options.max_gen_toks
    if room <= 0:
        raise ValueError(
            f"max_gen_toks ({chunk.options.max_gen_toks}) must be less than the context length ({loaded.max_length})"
        )
    if cut := sum(len(tokens) > room for tokens in sequences):
        logger.warning("%d prompts are cut on the left to their last %d tokens", cut, room)
    seeds = chunk.seeds or (0,) * len(sequences)
    return [
        Prompt(chunk_id=chunk.chunk_id, index=index, tokens=tokens[-room:] or (loaded.prefix_token_id,), seed=seed)
        for index, (tokens, seed) in enumerate(zip(sequences, seeds, strict=True))
    ]
