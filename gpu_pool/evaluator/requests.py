"""From lm-eval's instances to what a worker is asked, and back.

A `Unit` is one question to a worker. Equal deterministic questions of a job are one unit, asked once, whoever waits for
its answer: repeats of a greedy prompt, documents that occur twice, tasks that share documents.
"""

# pyright: basic
from __future__ import annotations

import hashlib
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from lm_eval.api.instance import Instance

from gpu_pool.cache import ENGINE_VERSION, Answer, answer_key
from gpu_pool.chunk_messages import GenerationOptions, MediaPrompt
from gpu_pool.evaluator.api_options import api_options
from gpu_pool.evaluator.api_prompts import TextPrompts
from gpu_pool.evaluator.generation_options import generation_options, is_deterministic
from gpu_pool.evaluator.media_prompts import MediaPrompts, Shown, arguments, forget_media, shows_media, stand_in
from gpu_pool.evaluator.prompts import PromptEncoder, PromptError
from gpu_pool.evaluator.tokenising import NO_TOKENS, Tokens
from gpu_pool.records import ModelSpec

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Unit:
    """One question: score `continuation` after `prompt`, or (with `options`) continue `prompt`."""

    prompt: Tokens
    continuation: Tokens = field(default_factory=lambda: NO_TOKENS)
    options: GenerationOptions | None = None
    shown: MediaPrompt | None = None
    """The prompt of a question with media, which only a worker can make tokens of: `prompt` stands in for them."""
    kind: str = "loglikelihood"
    """Units of one kind may share a chunk: the same for equal `options`."""
    seed: int = 0
    key: bytes | None = None
    """Of the response cache; None when the answer is a matter of chance."""
    answer: Answer | None = None
    error: str | None = None
    """Why there will be no answer."""
    asked: bool = False
    """Whether it is with the workers, or was."""
    waiting: Counter[str] = field(default_factory=Counter)
    """How often each task waits for the answer."""

    @property
    def is_open(self) -> bool:
        """Whether there is neither an answer nor an error yet."""
        return self.answer is None and self.error is None

    @property
    def cost(self) -> int:
        """Tokens to compute without what is shared; what chunks are measured in is a `prefix_line.Step`'s."""
        return len(self.prompt) + (self.options.max_gen_toks if self.options else len(self.continuation))

    @property
    def order(self) -> tuple[bytes, bytes]:
        """Sorts like the tokens that the model reads: units with equal beginnings come side by side.

        A continuation's last token is not read. Those that differ in it alone are one input: what else goes on there
        must not come between them.
        """
        tokens = np.concatenate([np.asarray(part, np.uint32) for part in (self.prompt, self.continuation)])
        read = len(tokens) - (len(self.continuation) > 0)
        in_order = tokens.astype(">u4")  # bytes compare like numbers whose highest byte comes first
        return in_order[:read].tobytes(), in_order[read:].tobytes()

    def forget_tokens(self) -> None:
        """Free what an answered unit no longer needs."""
        self.prompt = self.continuation = NO_TOKENS


@dataclass(slots=True)
class TaskRequests:
    """What one task waits for: for each instance, for each repeat, the units whose answers make the response."""

    responses: list[tuple[Instance, list[list[Unit]]]] = field(default_factory=list)

    def units(self) -> Iterable[Unit]:
        """Every unit as often as it is used."""
        return (unit for _, repeats in self.responses for units in repeats for unit in units)

    def deliver(self) -> dict[int | None, str]:
        """Give every instance its responses; returns the documents that lack some, and why."""
        errored: dict[int | None, str] = {}
        for instance, repeats in self.responses:
            for units in repeats:
                if error := next((unit.error for unit in units if unit.error is not None), None):
                    errored.setdefault(instance.doc_id, error)
                else:
                    instance.resps.append(_response(instance.request_type, units))
        return errored


class RequestBuilder:
    """Makes the units of one job."""

    def __init__(
        self,
        model: ModelSpec,
        encoder: PromptEncoder | TextPrompts,
        seed: int | None,
        media: MediaPrompts | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        """`media` makes the prompts of instances with media; None: there are none."""
        self._encoder = encoder
        self._media = media
        self._folders: Sequence[Path] = ()
        self._is_chat = False
        self._is_api = model.api is not None
        self._thinking = model.args.enable_thinking
        self._seed = secrets.token_bytes(8) if seed is None else str(seed).encode()
        self._scope = cache_scope(model, deterministic)
        self._units: dict[bytes, Unit] = {}
        self._has_warned = False

    def build(
        self, instances: Sequence[Instance], folders: Sequence[Path] = (), *, is_chat: bool = False
    ) -> TaskRequests:
        """The requests of these instances of one task, in their order.

        Relative paths of media are looked for in `folders`; `is_chat`: a chat template has placed them. In the
        instances a description takes the place of each file: a job's media are in files, not in memory.

        Raises:
            PromptError: the model or its arguments do not allow the kind of request.
            OptionsError: the task's `generation_kwargs` cannot be honoured.
        """
        makers: dict[str, Callable[[Sequence[Instance]], list[list[list[Unit]]]]] = {
            "loglikelihood": self._loglikelihood,
            "loglikelihood_rolling": self._rolling,
            "generate_until": self._generation,
            "loglikelihood with media": self._loglikelihood_with_media,
            "generate_until with media": self._generation_with_media,
        }
        self._folders = folders
        self._is_chat = is_chat
        kinds = {id(instance): self._kind(instance) for instance in instances}
        repeats: dict[int, list[list[Unit]]] = {}
        for kind in dict.fromkeys(kinds.values()):
            if kind not in makers:
                raise PromptError(f"{kind} cannot be asked: what is scored must follow what is shown")
            some = [instance for instance in instances if kinds[id(instance)] == kind]
            repeats.update(zip(map(id, some), makers[kind](some), strict=True))
        forget_media(instances)
        return TaskRequests([(instance, repeats[id(instance)]) for instance in instances])

    def _kind(self, instance: Instance) -> str:
        """Text to continue goes the way of prompts with media, which are text, too."""
        as_text = self._encoder.sends_text and instance.request_type == "generate_until"
        return instance.request_type + " with media" * (as_text or shows_media(instance))

    def _loglikelihood(self, instances: Sequence[Instance]) -> list[list[list[Unit]]]:
        if self._thinking:
            raise PromptError("enable_thinking=True cannot be used with log-likelihood tasks, only with generation")
        texts: list[Any] = [instance.args[:2] for instance in instances]
        pairs = self._encoder.encode_pairs(texts)
        return [
            [[self._scorable(*pair)]] * (instance.repeats or 1) for instance, pair in zip(instances, pairs, strict=True)
        ]

    def _scorable(self, context: Tokens, continuation: Tokens) -> Unit:
        """The unit of any pair: what cannot be scored has an error, and what the model cannot see is left out."""
        if problem := self._encoder.why_unscorable(context, continuation):
            return _errored(problem)
        seen = self._encoder.seen_context(context, continuation)
        if len(seen) < len(context) and not self._has_warned:  # one of a job stands for all
            self._has_warned = True
            _log.warning(
                "Combined length of context (%d) and continuation (%d) exceeds the model's maximum length (%d). "
                "Truncating %d tokens from the left, as from others that are too long.",
                len(context),
                len(continuation),
                self._encoder.max_length,
                len(context) - len(seen),
            )
        return self._scoring(seen, continuation)

    def _rolling(self, instances: Sequence[Instance]) -> list[list[list[Unit]]]:
        tokens = self._encoder.encode(instance.args[0] for instance in instances)
        return [[self._windows(tokens[instance.args[0]])] * (instance.repeats or 1) for instance in instances]

    def _windows(self, tokens: Tokens) -> list[Unit]:
        encoder = self._encoder
        return [self._scoring(*pair) for pair in rolling_windows(tokens, encoder.prefix_token_id, encoder.max_length)]

    def _generation(self, instances: Sequence[Instance]) -> list[list[list[Unit]]]:
        end = self._encoder.end_of_text
        options = [generation_options(instance.arguments[1], end) for instance in instances]
        prompts: dict[tuple[str, int], Tokens] = {}
        for room in {option.max_gen_toks for option in options}:
            texts = [i.args[0] for i, option in zip(instances, options, strict=True) if option.max_gen_toks == room]
            prompts.update(((text, room), ids) for text, ids in self._encoder.encode_prompts(texts, room).items())
        return [
            [
                [self._generating(instance, repeat, prompts[instance.args[0], option.max_gen_toks], option)]
                for repeat in range(instance.repeats or 1)
            ]
            for instance, option in zip(instances, options, strict=True)
        ]

    def _loglikelihood_with_media(self, instances: Sequence[Instance]) -> list[list[list[Unit]]]:
        if self._thinking:
            raise PromptError("enable_thinking=True cannot be used with log-likelihood tasks, only with generation")
        prompts = self._shown(instances)
        pairs = self._encoder.encode_pairs(
            [(prompt.text, arguments(instance)[1]) for instance, (prompt, _) in zip(instances, prompts, strict=True)]
        )
        repeats: list[list[list[Unit]]] = []
        for instance, (prompt, problem), (context, continuation) in zip(instances, prompts, pairs, strict=True):
            bare = msgspec.structs.replace(prompt, text=prompt.text.rstrip())  # the rest is the continuation's
            problem = problem or self._encoder.why_unscorable(context, continuation)
            unit = self._scoring(stand_in(bare, context), continuation, bare) if problem is None else _errored(problem)
            repeats.append([[unit]] * (instance.repeats or 1))
        return repeats

    def _generation_with_media(self, instances: Sequence[Instance]) -> list[list[list[Unit]]]:
        prompts = self._shown(instances)
        tokens = self._encoder.encode(prompt.text for prompt, _ in prompts)
        repeats: list[list[list[Unit]]] = []
        for instance, (prompt, problem) in zip(instances, prompts, strict=True):
            options = generation_options(instance.arguments[1], self._encoder.end_of_text)
            made = stand_in(prompt, tokens[prompt.text])
            units = [
                self._generating(instance, repeat, made, options, prompt) if problem is None else _errored(problem)
                for repeat in range(instance.repeats or 1)
            ]
            repeats.append([[unit] for unit in units])
        return repeats

    def _shown(self, instances: Sequence[Instance]) -> list[Shown]:
        assert self._media is not None, "nobody has said where files go"
        return self._media.of(instances, self._folders, is_chat=self._is_chat)

    def _scoring(self, context: Tokens, continuation: Tokens, shown: MediaPrompt | None = None) -> Unit:
        key = answer_key(self._scope, *_question(b"loglikelihood", context, shown), continuation.tobytes())
        kind = "loglikelihood" if shown is None else "loglikelihood with media"
        unit = Unit(prompt=context, continuation=continuation, shown=shown, kind=kind, key=key)
        return self._units.setdefault(key, unit)

    def _generating(
        self,
        instance: Instance,
        repeat: int,
        prompt: Tokens,
        options: GenerationOptions,
        shown: MediaPrompt | None = None,
    ) -> Unit:
        if self._is_api:
            options = api_options(options)
        written = msgspec.json.encode(options, order="sorted")
        kind = written.decode() if shown is None else f"{written.decode()} with media"
        unit = Unit(prompt=prompt, options=options, shown=shown, kind=kind)
        if not is_deterministic(options):
            unit.seed = self._sampling_seed(instance, repeat)
            return unit
        unit.key = answer_key(self._scope, *_question(b"generate", prompt, shown), written)
        return self._units.setdefault(unit.key, unit)

    def _sampling_seed(self, instance: Instance, repeat: int) -> int:
        """The same for the same document whatever else is evaluated, another one for each repeat."""
        place = f"{instance.task_name}/{instance.doc_id}/{instance.idx}/{repeat}".encode()
        return int.from_bytes(hashlib.sha256(self._seed + b"/" + place).digest()[:4], "big")


def _question(kind: bytes, prompt: Tokens, shown: MediaPrompt | None) -> tuple[bytes, ...]:
    """What tells a prompt from all others, as parts of a key."""
    if shown is None:
        return kind, prompt.tobytes()
    files = ["".join(shown.media)]
    if shown.frames or shown.audio:
        files += [",".join(map(str, shown.frames)), "".join(shown.audio)]
    return kind + b" with images", shown.text.encode(errors="surrogatepass"), *(part.encode() for part in files)


def _errored(problem: str) -> Unit:
    return Unit(prompt=NO_TOKENS, error=problem)


def rolling_windows(tokens: Tokens, prefix_token_id: int, max_length: int) -> Iterator[tuple[Tokens, Tokens]]:
    """(context, continuation) pairs whose continuations are all `tokens` in turn: as many as a window of `max_length`
    holds, each after whatever else fits of what comes before, at least one token.

    Source: lm-eval's `get_rolling_token_windows` with context_len=1, and `make_disjoint_window`.
    """
    prefixed = np.concatenate((np.array([prefix_token_id], np.uint32), tokens))
    for start in range(0, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        yield prefixed[max(end - max_length, 0) : start + 1], prefixed[start + 1 : end + 1]


def cache_scope(model: ModelSpec, deterministic: bool) -> bytes:
    """What all cache keys of a model begin with: its content and arguments, and what computes the answers."""
    if model.api is not None:
        return msgspec.json.encode([ENGINE_VERSION, model.fingerprint, model.args])
    libraries = [version("torch"), version("transformers")]
    return msgspec.json.encode([ENGINE_VERSION, model.replica_key, *libraries, *["deterministic"] * deterministic])


def _response(request_type: str, units: Sequence[Unit]) -> object:
    answers: list[Any] = [unit.answer for unit in units]
    if request_type == "loglikelihood_rolling":
        return sum(answer[0] for answer in answers)
    return answers[0]
