"""The worker's data channel: evaluators connect to a unix socket, say whose job they run, and send chunks.

One thread runs an asyncio loop that only moves bytes; the chunk queue is where they reach the computation.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from concurrent.futures import Future
from functools import partial

import msgspec

from gpu_pool.channel import Channel
from gpu_pool.chunk_messages import (
    ForgetMedia,
    FromWorkerData,
    GenerationChunk,
    Hello,
    LoglikelihoodChunk,
    Media,
    MediaFile,
    MediaGenerationChunk,
    MediaLoglikelihoodChunk,
    ToWorkerData,
    Welcome,
    decode_to_worker_data,
)
from gpu_pool.worker.chunk_queue import ChunkQueue, Client
from gpu_pool.worker.control import end_process
from gpu_pool.worker.engine.media_chunks import MediaChunk
from gpu_pool.worker.engine.preparation import MissingMedia, Preparation
from gpu_pool.worker.listening import listen_at


class ProtocolError(Exception):
    """Hello must come first, and once; files before the chunks that show them."""


def listen(path: str, queue: ChunkQueue, welcome: Welcome, preparation: Preparation) -> None:
    """Serve evaluators on the unix socket at `path`, for the life of the process; returns once it listens.

    What chunks show is prepared by `preparation` while they wait.

    Raises:
        OSError: the socket cannot be made.
    """
    listening: Future[None] = Future()

    def serve() -> None:
        try:
            asyncio.run(_serve(path, queue, welcome, preparation, listening))
        except BaseException:  # nobody could reach this worker any more
            traceback.print_exc()
            end_process(1)

    threading.Thread(target=serve, name="data channel", daemon=True).start()
    listening.result()


async def _serve(
    path: str, queue: ChunkQueue, welcome: Welcome, preparation: Preparation, listening: Future[None]
) -> None:
    try:
        server = await listen_at(path, partial(_serve_evaluator, queue, welcome, preparation))
    except OSError as error:
        listening.set_exception(error)
        return
    listening.set_result(None)
    await server.serve_forever()


async def _serve_evaluator(
    queue: ChunkQueue,
    welcome: Welcome,
    preparation: Preparation,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """One connection, until either side closes it."""
    channel = Channel(reader, writer, decode_to_worker_data)
    client: Client | None = None
    try:
        async for message in channel.messages():
            match message:
                case Hello(job_id=job_id) if client is None:
                    client = _client_of(job_id, channel)
                    queue.join(client)
                    channel.send(welcome)
                case LoglikelihoodChunk() | GenerationChunk() if client is not None:
                    queue.put(client, message)
                case MediaLoglikelihoodChunk() | MediaGenerationChunk() if client is not None:
                    queue.put(client, MediaChunk(message, preparation.plan(message.prompts, client.media)))
                case Media(digest=digest, data=data) if client is not None:
                    client.media[digest] = data
                case MediaFile(digest=digest) if client is not None:
                    client.media[digest] = message
                case ForgetMedia(digests=digests) if client is not None:
                    for digest in digests:
                        client.media.pop(digest, None)
                case _:
                    raise ProtocolError
    except (ConnectionError, msgspec.DecodeError, MissingMedia, ProtocolError) as error:
        print(f"data channel: a connection is closed: {error or error.__doc__}")
    finally:
        if client is not None:
            queue.leave(client)
        channel.close()


def _client_of(job_id: str, channel: Channel[ToWorkerData]) -> Client:
    loop = asyncio.get_running_loop()

    def send(message: FromWorkerData) -> None:
        sent = threading.Event()

        def send_now() -> None:
            channel.send(message)
            sent.set()

        loop.call_soon_threadsafe(send_now)
        sent.wait()

    def hang_up() -> None:
        loop.call_soon_threadsafe(channel.close)

    return Client(job_id, send, hang_up)
