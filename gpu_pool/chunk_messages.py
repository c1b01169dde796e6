"""Requests and answers of the model: between evaluator and worker (a unix socket), and between a worker's ranks.

One frozen Struct a message, one tagged union a direction; framed as `messages` are.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gpu_pool.messages import LoadFailed, Message
from gpu_pool.records import ApiModel, Record
from gpu_pool.token_sequences import TokenSequences

# ---------------------------------------------------------------- evaluator -> worker (data channel)


class Hello(Message, frozen=True, kw_only=True):
    """First message on a data channel: the job whose requests follow. Answered by Welcome."""

    job_id: str
    api: ApiModel | None = None
    """Where an endpoint is to be asked: for which model, and how."""


class GenerationOptions(Record, frozen=True, kw_only=True):
    """How to continue a prompt; the meaning is lm-eval's."""

    until: tuple[str, ...] = ()
    max_gen_toks: int = 256
    do_sample: bool = False
    kwargs: dict[str, Any] = {}
    """Everything else that transformers' GenerationConfig takes (temperature, top_p, num_beams…)."""


class LoglikelihoodChunk(Message, frozen=True, kw_only=True):
    """Score the last `scored[i]` tokens of sequence i after those before them; neither part is empty."""

    chunk_id: int
    sequences: TokenSequences
    scored: tuple[int, ...]
    batch_size: int | None = None
    """Most sequences in one forward pass; None: the worker decides ("auto")."""
    deterministic: bool = False
    """Whether the bits of an answer may depend on nothing but its request."""


class GenerationChunk(Message, frozen=True, kw_only=True):
    """Continue each prompt. `seeds[i]` seeds the sampling of prompt i, whatever it is batched with."""

    chunk_id: int
    prompts: TokenSequences
    options: GenerationOptions
    seeds: tuple[int, ...] = ()
    batch_size: int | None = None
    deterministic: bool = False


class Media(Message, frozen=True, kw_only=True):
    """A file that prompts of later chunks on this connection show, as it is; the worker keeps it until ForgetMedia."""

    digest: str
    """sha256 hex of `data`."""
    data: bytes


class MediaFile(Message, frozen=True, kw_only=True):
    """A file as Media has it, that stays where it is: a worker reads it from there when a prompt shows it."""

    digest: str
    path: str
    """Absolute."""
    size: int
    """Bytes."""
    modified_ns: int
    """With `size` tells whether it is still the file of that digest."""


class ForgetMedia(Message, frozen=True, kw_only=True):
    """No later chunk shows these, unless they are sent again; those sent before are not affected.

    The evaluator alone decides what a worker keeps: neither can be wrong about what the other one has.
    """

    digests: tuple[str, ...]


class MediaPrompt(Record, frozen=True, kw_only=True):
    """Text with the model's own placeholders, and the digests of what stands there, each kind in its order."""

    text: str
    media: tuple[str, ...] = ()
    """What is seen: images and videos."""
    frames: tuple[int, ...] = ()
    """Of each of `media`, as how many images it is shown where it is a video; 0: it is an image. Empty: all are."""
    audio: tuple[str, ...] = ()
    """What is heard."""

    @property
    def files(self) -> tuple[str, ...]:
        """All digests."""
        return (*self.media, *self.audio)


class MediaLoglikelihoodChunk(Message, frozen=True, kw_only=True):
    """Score each of `continuations` after the prompt of the number that `prompt_of` gives for it."""

    chunk_id: int
    prompts: tuple[MediaPrompt, ...]
    continuations: TokenSequences
    prompt_of: tuple[int, ...]
    batch_size: int | None = None
    deterministic: bool = False


class MediaGenerationChunk(Message, frozen=True, kw_only=True):
    """Continue each prompt, as GenerationChunk has it."""

    chunk_id: int
    prompts: tuple[MediaPrompt, ...]
    options: GenerationOptions
    seeds: tuple[int, ...] = ()
    batch_size: int | None = None
    deterministic: bool = False


ToWorkerData = (
    Hello
    | LoglikelihoodChunk
    | GenerationChunk
    | Media
    | MediaFile
    | ForgetMedia
    | MediaLoglikelihoodChunk
    | MediaGenerationChunk
)


# ---------------------------------------------------------------- worker -> evaluator (data channel)


class Welcome(Message, frozen=True, kw_only=True):
    """What an evaluator must know of the loaded model to cut requests."""

    worker_id: str
    max_length: int
    prefix_token_id: int
    dtype: str
    attn_implementation: str
    route: str
    """How the engine computes it: "tree", or "plain" where the token tree is not for this model."""
    route_reason: str
    no_media: str | None = None
    """Why it cannot be shown images or sounds, though such a model takes some."""


class ChunkBegun(Message, frozen=True, kw_only=True):
    """The chunk is computed from now on, alone or together with others: if the worker dies, it may be the cause.

    It has left the worker before the computation begins.
    """

    chunk_id: int


class LoglikelihoodDone(Message, frozen=True, kw_only=True):
    """(sum of log-probabilities of the continuation, whether greedy decoding gives it), in request order.

    None where a request cannot be answered while the others are: `errors` says why, by its place.
    """

    chunk_id: int
    answers: tuple[tuple[float, bool] | None, ...]
    seconds: float
    errors: dict[int, str] = {}
    plainly: str = ""
    """Why a model of the "tree" route computed some of it the plain way, if it did."""


class GenerationDone(Message, frozen=True, kw_only=True):
    """Texts as lm-eval's HF backend returns them: special tokens skipped, cut at the first stop string.

    None and `errors` as in LoglikelihoodDone.
    """

    chunk_id: int
    texts: tuple[str | None, ...]
    seconds: float
    """Of the worker's time; for chunks that were computed together the mean of those that have ended."""
    errors: dict[int, str] = {}
    plainly: str = ""
    """As in LoglikelihoodDone."""


class ChunkFailed(Message, frozen=True, kw_only=True):
    """The chunk raised; the worker lives on."""

    chunk_id: int
    error: str


FromWorkerData = Welcome | ChunkBegun | LoglikelihoodDone | GenerationDone | ChunkFailed

# ---------------------------------------------------------------- worker <-> its other ranks (a pipe each)


class RankStep(Message, frozen=True, kw_only=True):
    """Rank 0, the worker itself, goes on to its next step in the chunk, or stops there: all ranks do."""

    number: int
    """From 1 in each chunk."""
    stop: bool


class RankJoin(Message, frozen=True, kw_only=True):
    """Rank 0 was asked for a chunk that joins the one being computed: this one does, on all ranks."""

    chunk: GenerationChunk | None


ToRank = LoglikelihoodChunk | GenerationChunk | RankStep | RankJoin
"""A chunk is to be computed by every rank, with its shard of the model; steps and joins follow."""


class RankReady(Message, frozen=True, kw_only=True):
    """This rank's shard is loaded."""

    memory_bytes: int


class RankDone(Message, frozen=True, kw_only=True):
    """This rank has an answer or is through, after so many steps: "answered", "done", or the type of what it raised."""

    outcome: str
    steps: int


FromRank = RankReady | LoadFailed | RankDone

decode_to_worker_data = msgspec.msgpack.Decoder(ToWorkerData).decode
decode_from_worker_data = msgspec.msgpack.Decoder(FromWorkerData).decode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
