# pyright: basic
"""A language model in memory: how it is called, and the facts that decide what may be asked of it at once."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from gpu_pool.checkpoints import SPEECH_TYPES
from gpu_pool.chunk_messages import MediaPrompt
from gpu_pool.worker.engine.adapters import has_virtual_tokens, unwrapped
from gpu_pool.worker.engine.announcing import announce_if_long
from gpu_pool.worker.engine.blocks import Tokens
from gpu_pool.worker.engine.company import Company, generated_logits, probe_company, probed_window
from gpu_pool.worker.engine.configs import text_config
from gpu_pool.worker.engine.encoder_decoder import decoded_logits
from gpu_pool.worker.engine.head import find_layers
from gpu_pool.worker.engine.limits import Limits
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.multimodal_checks import MediaFacts, check_media
from gpu_pool.worker.engine.packed import measure_token_bytes
from gpu_pool.worker.engine.padding import pad_right
from gpu_pool.worker.engine.prefix_cache import PrefixCache
from gpu_pool.worker.engine.preparation import Files
from gpu_pool.worker.engine.processing import PromptProcessor
from gpu_pool.worker.engine.prompt_inputs import PromptInputs
from gpu_pool.worker.engine.rope import rope_boundary
from gpu_pool.worker.engine.routes import Boundary, Route, choose_route, tree_boundary
from gpu_pool.worker.engine.token_tree import GRID, Room

logger = logging.getLogger(__name__)

_PROBE = (3, 4, 5, 6)
"""Tokens to try a model with."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to be called, and the facts about it that the calls depend on."""

    model: Any
    tokenizer: Any
    device: torch.device
    """Where input ids go (the first device of a model that is spread over several)."""
    max_length: int
    prefix_token_id: int
    think_end_token: str | int | None
    softmax_dtype: torch.dtype
    limits: Limits
    forward_names: frozenset[str]
    """Keyword arguments that the model's own forward takes."""
    processor: PromptProcessor | None = None
    """Of a model that takes images or sounds."""
    no_media: str | None = None
    """Why such a model has no processor, and reads text only."""
    speech: Mapping[str, str] = field(default_factory=dict[str, str])
    """What a speech model is told beside the sound: its `language`, its `task`."""

    @property
    def transcribes(self) -> bool:
        """Whether it writes down one sound, whatever it is asked."""
        return self.model.config.model_type in SPEECH_TYPES

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def attn_implementation(self) -> str:
        return str(getattr(self.model.config, "_attn_implementation", None) or "eager")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a context is read by an encoder, and its continuation written by a decoder."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def narrows_logits(self) -> bool:
        """Whether forward can leave out the logits of positions that nobody scores."""
        return "logits_to_keep" in self.forward_names and not has_virtual_tokens(self.model)

    @property
    def base_model(self) -> Any:
        """The transformers model, without an adapter around it."""
        return unwrapped(self.model)

    @property
    def text_config(self) -> Any:
        """The config of the language model."""
        return text_config(self.model.config)

    @cached_property
    def route(self) -> tuple[Route, str]:
        """The way that it is computed, and why."""
        return choose_route(self)

    @cached_property
    def _told(self) -> set[str]:
        """What the log has said of requests that were not computed along the token tree."""
        return set()

    def tell_plain(self, requests: str, why: str) -> None:
        """Say in the log, each thing once, that such requests do not go along the token tree though the model does."""
        if (told := f"{requests} are computed the plain way: {why}") not in self._told:
            self._told.add(told)
            logger.warning(told)

    @cached_property
    def token_bytes(self) -> int:
        """Memory of a token's keys and values along the token tree; 0 where nothing is computed along it."""
        return measure_token_bytes(self.model) if self.route[0] is Route.TREE else 0

    @cached_property
    def tree_boundary(self) -> Boundary | None:
        """The longest sequences that go along the token tree, where that bounds them: found once, asked for each."""
        return tree_boundary(self)

    def goes_along_tree(self, longest: int) -> bool:
        """Whether sequences of at most `longest` tokens are computed along the token tree."""
        boundary = self.tree_boundary
        return self.route[0] is Route.TREE and (boundary is None or longest <= boundary.length)

    @property
    def vocabulary(self) -> int:
        """Logits of a position."""
        return self.model.get_input_embeddings().weight.shape[0]

    def room(self, sequences: float, free_bytes: float = math.inf) -> Room:
        """What a forward pass along the token tree that answers at most so many `sequences` may hold at present.

        `free_bytes`: memory for keys and values that are kept.
        """
        return Room(self.limits.scored_tokens, self.limits.scored_positions(self.vocabulary), sequences, free_bytes)

    @cached_property
    def prefix_cache(self) -> PrefixCache:
        """Keys and values of beginnings that requests share."""
        return PrefixCache(self.limits.prefix_bytes, self.token_bytes)

    @cached_property
    def grid_cache(self) -> PrefixCache:
        """The same for deterministic requests, whose blocks are others; in the same memory."""
        return self.prefix_cache.of_grid(GRID)

    @cached_property
    def company(self) -> Company:
        """Which prompts may be continued together; of an encoder, which contexts it may be given together."""
        if self.is_encoder_decoder:
            return self._probe(lambda contexts: decoded_logits(self.model, contexts, _PROBE)[0], "generated_tokens")
        return self._probe(partial(generated_logits, self.model), "generated_tokens")

    @cached_property
    def media(self) -> MediaFacts:
        """What prompts with media may share."""
        return check_media(self)

    @cached_property
    def scoring_company(self) -> Company:
        """Which rows may be scored together the plain way, padded on the right behind no mask."""

        def last_logits(sequences: Sequence[Tokens]) -> torch.Tensor:
            last = torch.tensor([len(sequences[0]) - 1], device=self.device)
            return self.logits(pad_right(sequences, self.device), last)[0]

        return self._probe(last_logits, "scored_tokens")

    def _probe(self, logits: Callable[[Sequence[Tokens]], torch.Tensor], limit: str) -> Company:
        """As `probe_company`; beyond the window where batches within `limit` are."""
        longest = rope_boundary(self) or self.max_length
        window = probed_window(self.text_config, longest, self.limits.planned[limit])
        announce_if_long(window, f"trying whether sequences beyond the window of {window} tokens may share batches")
        return probe_company(self.model, logits, window)

    @cached_property
    def layers(self) -> Any:
        """What can be run once for several pieces of logits (`logits_in_pieces`); None where nothing can."""
        forward = partial(self.all_logits, pad_right([_PROBE], self.device))
        if self.is_encoder_decoder:
            forward = partial(decoded_logits, self.model, [_PROBE], _PROBE)
        return find_layers(self.base_model, forward, len(_PROBE))

    def all_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, width, vocabulary] of right-padded `ids`, behind those of an adapter's virtual tokens.

        No attention mask: causal attention never looks at the padding behind a sequence (see `scoring_company`).
        """
        return self.model(input_ids=ids, **self._without_cache).logits

    def logits(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [rows, len(positions), vocabulary] of right-padded `ids` [rows, width] at `positions` (ascending)."""
        if self.narrows_logits:
            return self.model(input_ids=ids, logits_to_keep=positions, **self._without_cache).logits
        logits = self.all_logits(ids)
        virtual_tokens = logits.shape[1] - ids.shape[1]
        return logits[:, positions.to(logits.device) + virtual_tokens]

    @property
    def last_logits(self) -> dict[str, int]:
        """Arguments of a forward pass of which only the last position's logits are looked at."""
        return {"logits_to_keep": 1} if self.narrows_logits else {}

    @property
    def _without_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if "use_cache" in self.forward_names else {}

    def prepare(self, prompt: MediaPrompt, media: Files) -> PromptInputs:
        """What forward takes for a prompt with media, whose files are `media`.

        Raises:
            MediaError: something cannot be shown, or not to this model.
        """
        if self.processor is None:
            raise MediaError(self.no_media or "this model reads text only")
        return self.processor.prepare(prompt, media)

    def generated_rows(self, longest: int, in_blocks: int = 0) -> int:
        """Sequences that may be continued at once, when each may grow to `longest` tokens of its own.

        Beside them there is to be memory for `in_blocks` tokens in the tree's blocks.
        """
        in_slots = self.limits.held_bytes - in_blocks * self.token_bytes
        return max(1, min(self.limits.generated_rows, in_slots // (longest * self.token_bytes)))

    def shrink_generated_rows(self, rows: int, longest: int, in_blocks: int = 0) -> None:
        """Memory did not suffice for so many of them: from now on it is taken to suffice for half as many.

        One alone says nothing of others.
        """
        if rows > 1:
            fitting = (rows // 2 * longest + in_blocks) * self.token_bytes
            self.limits.held_bytes = min(self.limits.held_bytes, fitting)

    def check_tokens(self, sequences: Any) -> None:
        """Refuse ids outside the vocabulary: on a GPU they would end the process.

        Raises:
            ValueError: a sequence holds such an id.
        """
        size = self.model.get_input_embeddings().weight.shape[0]
        tokens = list(itertools.chain.from_iterable(sequences))
        if tokens and not 0 <= min(tokens) <= max(tokens) < size:
            raise ValueError(f"token ids must lie in 0..{size - 1}; found {min(tokens)} to {max(tokens)}")

    def memory_bytes(self) -> int:
        """Memory held: of all visible GPUs, or of this process on a CPU."""
        if self.device.type == "cuda":
            return sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def describe(self) -> str:
        """One line for people."""
        name = type(unwrapped(self.model)).__name__
        millions = unwrapped(self.model).num_parameters() / 1e6
        weights = "".join(f", {method} weights" for method in _quantization_methods(self.model))
        ranks = getattr(unwrapped(self.model), "tp_size", None) or 1
        sharded = f", sharded over {ranks} ranks" if ranks > 1 else ""
        route, reason = self.route
        facts = f"{millions:.1f} M parameters, {self.dtype}{weights}, {self.attn_implementation} attention{sharded}"
        media = f"; media: {self.media}" if self.processor else ""
        return f"{name}, {facts}; {route} route: {reason}{media}"


def _quantization_methods(model: Any) -> list[str]:
    """How the weights are quantised: one method or none."""
    quantization = getattr(model.config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    return [str(getattr(method, "value", method))] if method else []
