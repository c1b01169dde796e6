# pyright: basic
"""Scores continuations after prompts with media: a prompt is read once, its keys and values serve all continuations.

Prompts share a forward pass where they have as many tokens and as many continuations, so that nothing but the ends of
continuations is padded, which no position looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gpu_pool.chunk_messages import MediaLoglikelihoodChunk
from gpu_pool.worker.engine.batching import run_batches
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.media_chunks import MediaChunk
from gpu_pool.worker.engine.padding import pad_right
from gpu_pool.worker.engine.prompt_inputs import PromptInputs, collate, seen_after
from gpu_pool.worker.engine.rows import Answer
from gpu_pool.worker.engine.token_scores import TokenScores

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class _Question:
    """A prompt and the continuations (request, tokens) that are scored after it."""

    inputs: PromptInputs
    asked: list[tuple[int, Tokens]] = field(default_factory=list)

    @property
    def read(self) -> list[Tokens]:
        """Distinct tokens that must be read behind the prompt: of continuations of several tokens all but the last."""
        return sorted({tokens[:-1] for _, tokens in self.asked if len(tokens) > 1})

    @property
    def width(self) -> int:
        """Tokens of prompt and longest continuation that are read."""
        return len(self.inputs) + max(len(tokens) for _, tokens in self.asked) - 1


def score(
    loaded: LoadedModel, chunk: MediaChunk, should_stop: Callable[[], bool]
) -> tuple[dict[int, Answer], dict[int, str]]:
    """The answer to each of the chunk's requests, or why there is none; `should_stop` is asked before forward passes.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: a continuation that cannot be scored (empty, not the model's vocabulary).
    """
    asked = chunk.asked
    assert isinstance(asked, MediaLoglikelihoodChunk)
    if loaded.transcribes:
        raise ValueError("a model that writes down what it hears scores no texts")
    continuations = [tuple(tokens) for tokens in asked.continuations.unpack()]
    loaded.check_tokens(continuations)
    if not all(continuations):
        raise ValueError("a continuation is empty")
    answers: dict[int, Answer] = {}
    errors: dict[int, str] = {}
    unread: dict[int, str] = {}
    requests: dict[int, list[int]] = {}
    for request, number in enumerate(asked.prompt_of):
        requests.setdefault(number, []).append(request)
    for window in chunk.windows(unread, should_stop):
        questions: list[_Question] = []
        for number, inputs in window.items():
            asking = [(request, continuations[request]) for request in requests.get(number, ())]
            if not asking:
                continue
            try:
                questions.append(_Question(_that_fits(loaded, inputs, asking), asking))
            except MediaError as error:
                errors |= dict.fromkeys((request for request, _ in asking), str(error))
        answers |= _score_window(loaded, questions, asked, should_stop)
    errors |= {request: unread[number] for request, number in enumerate(asked.prompt_of) if number in unread}
    return answers, errors


def _that_fits(loaded: LoadedModel, inputs: PromptInputs, asking: list[tuple[int, Tokens]]) -> PromptInputs:
    """The prompt without what is too much at its beginning, the same for all its continuations, whose last tokens are
    not read.

    Raises:
        MediaError: an image stands there, or a continuation leaves no room for a prompt.
    """
    longest = max(len(tokens) for _, tokens in asking)
    room = loaded.max_length - longest + 1
    if room <= 0:
        raise MediaError(f"a continuation has {longest} tokens, and {loaded.max_length} fit with its prompt")
    return inputs.last(room)


def _score_window(
    loaded: LoadedModel, questions: list[_Question], asked: MediaLoglikelihoodChunk, should_stop: Callable[[], bool]
) -> dict[int, Answer]:
    score_batch = _score_batch if loaded.media.shares_prompts else _score_wholes
    kinds = {kind: place for place, kind in enumerate(dict.fromkeys(question.inputs.kind for question in questions))}
    questions.sort(key=lambda question: (kinds[question.inputs.kind], -len(question.inputs), len(question.read)))

    def run(batch: list[_Question]) -> list[tuple[int, Answer]]:
        if should_stop():
            raise Cancelled
        scores = TokenScores(loaded.softmax_dtype)
        score_batch(loaded, batch, scores)
        return list(scores.answers().items())

    def on_shortage(batch: list[_Question]) -> None:
        loaded.limits.shrink(len(batch) * batch[0].width)

    return dict(run_batches(run, questions, _fits(loaded, asked), on_shortage))


def _fits(loaded: LoadedModel, asked: MediaLoglikelihoodChunk) -> Callable[[list[_Question], _Question], bool]:
    """Whether one more question may be read together with the others."""
    alone = asked.deterministic or loaded.media.company is Company.NONE or not loaded.media.shares_prompts
    most_positions = loaded.limits.scored_positions(loaded.vocabulary)

    def fits(batch: list[_Question], question: _Question) -> bool:
        first, count = batch[0], len(batch) + 1
        if alone or first.inputs.kind != question.inputs.kind or len(first.inputs) != len(question.inputs):
            return False
        if len(first.read) != len(question.read) or (asked.batch_size and count > asked.batch_size):
            return False
        width = max(one.width for one in (*batch, question))
        positions = count * max(1, len(first.read)) * (width - len(first.inputs) + 1)
        return positions <= most_positions and count * width <= loaded.limits.scored_tokens

    return fits


@torch.inference_mode()
def _score_batch(loaded: LoadedModel, batch: Sequence[_Question], scores: TokenScores) -> None:
    """Score what follows prompts of equal lengths with equally many distinct continuations."""
    rows = [(number, read) for number, question in enumerate(batch) for read in question.read]
    first, others = shared_logits(loaded, [question.inputs for question in batch], [read for _, read in rows])
    scores.add(
        first,
        [(number, tokens[0], request) for number, question in enumerate(batch) for request, tokens in question.asked],
    )
    if others is None:
        return
    start = {row: place * others.shape[1] for place, row in enumerate(rows)}
    scores.add(
        others.flatten(0, 1),
        [
            (start[number, tokens[:-1]] + position, token, request)
            for number, question in enumerate(batch)
            for request, tokens in question.asked
            for position, token in enumerate(tokens[1:])
        ],
    )


@torch.inference_mode()
def shared_logits(
    loaded: LoadedModel, prompts: Sequence[PromptInputs], reads: Sequence[Tokens]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits after prompts of equal kind and length [prompts, vocabulary], and after each token of what is read then.

    `reads` are equally many for each prompt, in the order of the prompts, and padded on the right; their logits are
    [reads, longest, vocabulary]. Neither masks of padding nor positions are given: without padding before it, a token's
    position is the number of those before it, or what the model has kept of its own counting of images.
    """
    inputs = collate(prompts, loaded.device, loaded.model.dtype)
    output = loaded.model(**inputs, **loaded.last_logits, use_cache=True)
    first = output.logits[:, -1]
    if not reads:
        return first, None
    cache, times = output.past_key_values, len(reads) // len(prompts)
    cache.batch_repeat_interleave(times)
    ids = pad_right(reads, loaded.device)
    seen = {name: tensor.repeat_interleave(times, 0) for name, tensor in seen_after(inputs, ids.shape[1]).items()}
    return first, loaded.model(input_ids=ids, **seen, past_key_values=cache, use_cache=True).logits


@torch.inference_mode()
def _score_wholes(loaded: LoadedModel, batch: Sequence[_Question], scores: TokenScores) -> None:
    """The same by a forward pass of prompt and continuation for each: for models whose keys do not serve others."""
    for question in batch:
        for request, tokens in question.asked:
            logits = whole_logits(loaded, question.inputs, tokens)
            scores.add(logits, [(position, token, request) for position, token in enumerate(tokens)])


@torch.inference_mode()
def whole_logits(loaded: LoadedModel, prompt: PromptInputs, continuation: Tokens) -> torch.Tensor:
    """Logits [len(continuation), vocabulary] that score a continuation, by one forward pass of it and its prompt."""
    whole = prompt.extended(continuation[:-1]) if len(continuation) > 1 else prompt
    inputs = collate([whole], loaded.device, loaded.model.dtype)
    return loaded.model(**inputs, use_cache=False).logits[0, -len(continuation) :]
