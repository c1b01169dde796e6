"""Images over a real worker's data channel: sent once, shown by any later chunk, forgotten when it is told to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from digits import MODEL, QUESTION, held_out, image_bytes
from worker_process import Evaluator, WorkerProcess, worker_start

from gpu_pool.chunk_messages import (
    ForgetMedia,
    GenerationDone,
    GenerationOptions,
    LoglikelihoodDone,
    Media,
    MediaGenerationChunk,
    MediaLoglikelihoodChunk,
    MediaPrompt,
)
from gpu_pool.messages import WorkerReady
from gpu_pool.token_sequences import TokenSequences

FILES = [image_bytes(image) for image, _ in held_out(3)] + [b"no image"]
DIGITS = [str(digit) for _, digit in held_out(3)]
DIGESTS = [hashlib.sha256(data).hexdigest() for data in FILES]
TEXT = f"<|im_start|>User:{QUESTION.replace('<image>', '<image> ')}<end_of_utterance>\nAssistant:"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    process = WorkerProcess(worker_start(tmp_path_factory.mktemp("worker"), MODEL))
    assert isinstance(process.receive(), WorkerReady)
    yield process
    process.close()


@pytest.fixture
def evaluator(worker: WorkerProcess) -> Evaluator:
    return worker.connect("job")


def asking(chunk_id: int, *places: int) -> MediaGenerationChunk:
    prompts = tuple(MediaPrompt(text=TEXT, media=(DIGESTS[place],)) for place in places)
    return MediaGenerationChunk(chunk_id=chunk_id, prompts=prompts, options=GenerationOptions(max_gen_toks=4))


def test_files_are_sent_once_and_bad_ones_are_errors_of_their_prompts(evaluator: Evaluator) -> None:
    for digest, data in zip(DIGESTS, FILES, strict=True):
        evaluator.send(Media(digest=digest, data=data))
    evaluator.send(asking(1, 0, 3, 1))
    evaluator.send(ForgetMedia(digests=(DIGESTS[0],)))  # the chunk before has it all the same
    evaluator.send(asking(2, 1, 2))
    first, second = evaluator.receive(), evaluator.receive()
    assert isinstance(first, GenerationDone)
    assert [text and text.strip() for text in first.texts] == [DIGITS[0], None, DIGITS[1]]
    assert list(first.errors) == [1]
    assert "no image" in first.errors[1]
    assert [text.strip() for text in second.texts] == DIGITS[1:]
    assert second.errors == {}


def test_choices_of_a_bad_image_are_errors_each(evaluator: Evaluator) -> None:
    for place in (0, 3):
        evaluator.send(Media(digest=DIGESTS[place], data=FILES[place]))
    prompts = tuple(MediaPrompt(text=TEXT, media=(DIGESTS[place],)) for place in (0, 3))
    continuations = TokenSequences.pack([(7,), (8, 9), (7,), (8, 9)])
    evaluator.send(
        MediaLoglikelihoodChunk(chunk_id=1, prompts=prompts, continuations=continuations, prompt_of=(0, 0, 1, 1))
    )
    done = evaluator.receive()
    assert isinstance(done, LoglikelihoodDone)
    assert [answer is None for answer in done.answers] == [False, False, True, True]
    assert set(done.errors) == {2, 3}


def test_a_chunk_that_shows_what_was_not_sent_closes_the_connection(evaluator: Evaluator) -> None:
    evaluator.send(asking(1, 0))
    assert evaluator.is_closed()
