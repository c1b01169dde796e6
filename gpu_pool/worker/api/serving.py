"""The loop of the process that asks an endpoint: evaluators' chunks in, answers out; the server's wishes between."""

from __future__ import annotations

import asyncio
import io
import traceback
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, assert_never

import msgspec

from gpu_pool.channel import Channel
from gpu_pool.chunk_messages import (
    ForgetMedia,
    GenerationChunk,
    GenerationDone,
    Hello,
    LoglikelihoodChunk,
    LoglikelihoodDone,
    Media,
    MediaGenerationChunk,
    MediaLoglikelihoodChunk,
    MediaPrompt,
    ToWorkerData,
    Welcome,
    decode_to_worker_data,
)
from gpu_pool.messages import (
    Alive,
    ApiWorkerStart,
    BatchProgress,
    DropJob,
    Dropped,
    LoadFailed,
    Ping,
    Shutdown,
    ToWorker,
    WorkerReady,
    decode_to_worker,
)
from gpu_pool.records import ApiModel
from gpu_pool.worker.api.asking import Asker, AskingFailed, NoKey, read_key
from gpu_pool.worker.api.bodies import (
    Body,
    UnreadableAnswer,
    answer_score,
    answer_text,
    chat_body,
    completion_body,
    png_url,
    scoring_body,
)
from gpu_pool.worker.engine.media import MediaError, decode_image
from gpu_pool.worker.listening import listen_at

PULSE_SECONDS = 1.0
"""While requests are on their way, each of which has a limit of its own."""

Chunk = LoglikelihoodChunk | GenerationChunk | MediaGenerationChunk


class Client:
    """One evaluator's connection."""

    def __init__(self, job_id: str, api: ApiModel, channel: Channel[ToWorkerData]) -> None:
        self.job_id = job_id
        self.api = api
        self.channel = channel
        self.media: dict[str, bytes] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def end(self) -> None:
        """Ask nothing more for it, not even what is on its way."""
        for task in self.tasks:
            task.cancel()
        self.channel.close()


async def serve(connection: Connection, start: ApiWorkerStart) -> None:
    """Until the control pipe says otherwise."""
    control = await Channel[ToWorker].over(connection, decode_to_worker)
    try:
        read_key(start.endpoint)
        service = Service(start)
        await listen_at(start.socket_path, service.serve_evaluator)
    except (NoKey, OSError) as error:
        control.send(LoadFailed(error=f"endpoint {start.name} cannot be asked: {error}"))
        return
    control.send(WorkerReady(memory_bytes=0, description=f"endpoint {start.name}: {start.endpoint.url}"))
    pulse = asyncio.create_task(service.pulse(control))
    async for message in control.messages():
        match message:
            case DropJob(job_id=job_id):
                service.drop(job_id)
                control.send(Dropped(job_id=job_id))
            case Ping():
                control.send(Alive())
            case Shutdown():
                break
            case _:
                assert_never(message)
    pulse.cancel()
    await service.asker.close()


class Service:
    """Answers evaluators' chunks by asking the endpoint."""

    def __init__(self, start: ApiWorkerStart) -> None:
        self.asker = Asker(start.endpoint)
        self._start = start
        self._clients: set[Client] = set()

    async def pulse(self, control: Channel[ToWorker]) -> None:
        """Let the server know that this process lives while it owes answers."""
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            if self.asker.asked:
                control.send(BatchProgress())

    def drop(self, job_id: str) -> None:
        """Forget a job's chunks and hang up on its evaluator."""
        for client in [client for client in self._clients if client.job_id == job_id]:
            client.end()

    async def serve_evaluator(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side closes it."""
        channel = Channel(reader, writer, decode_to_worker_data)
        client: Client | None = None
        try:
            async for message in channel.messages():
                match message:
                    case Hello(job_id=job_id, api=ApiModel() as api) if client is None:
                        client = Client(job_id, api, channel)
                        self._clients.add(client)
                        channel.send(self._welcome())
                    case LoglikelihoodChunk() | GenerationChunk() | MediaGenerationChunk() if client is not None:
                        self._begin(client, message)
                    case Media(digest=digest, data=data) if client is not None:
                        client.media[digest] = data
                    case ForgetMedia(digests=digests) if client is not None:
                        for digest in digests:
                            client.media.pop(digest, None)
                    case MediaLoglikelihoodChunk() | Hello() | _:
                        raise ConnectionError("it sends what no endpoint can be asked")
        except (ConnectionError, KeyError, msgspec.DecodeError) as error:
            print(f"data channel: a connection is closed: {error!r}")
        finally:
            if client is not None:
                self._clients.discard(client)
                client.end()
            channel.close()

    def _welcome(self) -> Welcome:
        return Welcome(
            worker_id=self._start.worker_id,
            max_length=0,
            prefix_token_id=0,
            dtype="",
            attn_implementation="",
            route="api",
            route_reason=f"endpoint {self._start.name}: {self._start.endpoint.url}",
        )

    def _begin(self, client: Client, chunk: Chunk) -> None:
        media = client.media if isinstance(chunk, MediaGenerationChunk) else {}
        shown = {digest: media[digest] for prompt in _prompts(chunk) for digest in prompt.media}
        task = asyncio.create_task(self._answer(client, chunk, shown))
        client.tasks.add(task)
        task.add_done_callback(client.tasks.discard)

    async def _answer(self, client: Client, chunk: Chunk, shown: dict[str, bytes]) -> None:
        """Answer a chunk: all that it asks at once."""
        began = asyncio.get_running_loop().time()
        count = len(chunk.sequences if isinstance(chunk, LoglikelihoodChunk) else chunk.prompts)
        answers: list[Any] = [None] * count
        errors: dict[int, str] = {}

        async def one(place: int) -> None:
            try:
                answers[place] = await self._ask(client.api, chunk, place, shown)
            except (AskingFailed, UnreadableAnswer, MediaError) as error:
                errors[place] = str(error)
            except Exception as error:
                traceback.print_exc()
                errors[place] = f"the endpoint could not be asked: {type(error).__name__}"

        await asyncio.gather(*map(one, range(count)))
        seconds, found, number = asyncio.get_running_loop().time() - began, tuple(answers), chunk.chunk_id
        if isinstance(chunk, LoglikelihoodChunk):
            client.channel.send(LoglikelihoodDone(chunk_id=number, answers=found, seconds=seconds, errors=errors))
        else:
            client.channel.send(GenerationDone(chunk_id=number, texts=found, seconds=seconds, errors=errors))

    async def _ask(self, api: ApiModel, chunk: Chunk, place: int, shown: dict[str, bytes]) -> str | tuple[float, bool]:
        ask = partial(self.asker.ask, timeout_s=api.timeout_s, max_retries=api.max_retries)
        if isinstance(chunk, LoglikelihoodChunk):
            tokens = chunk.sequences.unpack()[place]
            return answer_score(await ask(scoring_body(api, tokens)), len(tokens), chunk.scored[place])
        body = await self._generation_body(api, chunk, place, shown)
        return answer_text(await ask(body), api, chunk.options)

    async def _generation_body(
        self, api: ApiModel, chunk: GenerationChunk | MediaGenerationChunk, place: int, shown: dict[str, bytes]
    ) -> Body:
        options, name = chunk.options, self._start.endpoint.max_tokens_name
        seed = chunk.seeds[place] if chunk.seeds else None
        if isinstance(chunk, GenerationChunk):
            return completion_body(api, chunk.prompts.unpack()[place], options, seed, name)
        prompt = chunk.prompts[place]
        if api.kind == "completions":
            return completion_body(api, prompt.text, options, seed, name)
        urls = {digest: await asyncio.to_thread(_url, shown[digest]) for digest in dict.fromkeys(prompt.media)}
        return chat_body(api, prompt, options, seed, name, urls.__getitem__)


def _prompts(chunk: Chunk) -> Sequence[MediaPrompt]:
    return chunk.prompts if isinstance(chunk, MediaGenerationChunk) else ()


def _url(file: bytes) -> str:
    """An image's file as what every endpoint takes: whatever Pillow reads, upright, as PNG."""
    image = decode_image(file)
    png = io.BytesIO()
    (image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB")).save(png, "PNG")
    return png_url(png.getvalue())
