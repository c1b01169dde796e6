"""The worker's data channel: evaluators connect to a unix socket, say whose job they run, and send chunks.

One thread runs an asyncio loop that only moves bytes; the desk is where they reach the computation.
"""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from concurrent.futures import Future
from functools import partial

import msgspec

from gpu_pool.messages import (
    MAX_MESSAGE_BYTES,
    FromWorkerData,
    Hello,
    ToWorkerData,
    Welcome,
    decode_to_worker_data,
    encode,
)
from gpu_pool.worker.desk import Client, Desk

_LENGTH = struct.Struct("!i")


class ProtocolError(Exception):
    """An evaluator sent what does not belong there; its connection is closed."""


def listen(path: str, desk: Desk, welcome: Welcome) -> None:
    """Serve evaluators on the unix socket at `path`, for the life of the process; returns once it listens.

    Raises:
        OSError: the socket cannot be made.
    """
    listening: Future[None] = Future()
    serve = partial(asyncio.run, _serve(path, desk, welcome, listening))
    threading.Thread(target=serve, name="data channel", daemon=True).start()
    listening.result()


async def _serve(path: str, desk: Desk, welcome: Welcome, listening: Future[None]) -> None:
    try:
        server = await asyncio.start_unix_server(partial(_serve_evaluator, desk, welcome), path)
        os.chmod(path, 0o600)
    except OSError as error:
        listening.set_exception(error)
        return
    listening.set_result(None)
    await server.serve_forever()


async def _serve_evaluator(
    desk: Desk, welcome: Welcome, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """One connection, from Hello until either side closes it."""
    client: Client | None = None
    try:
        hello = await _receive(reader)
        if not isinstance(hello, Hello):
            raise ProtocolError("the first message must be Hello")
        client = _client_of(hello, writer)
        desk.join(client)
        client.send(welcome)
        while True:
            chunk = await _receive(reader)
            if isinstance(chunk, Hello):
                raise ProtocolError("Hello came twice")
            desk.put(client, chunk)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the evaluator has gone
    except (ProtocolError, msgspec.DecodeError) as error:
        print(f"data channel: closing a connection: {error}")
    finally:
        if client is not None:
            desk.leave(client)
        writer.transport.abort()


async def _receive(reader: asyncio.StreamReader) -> ToWorkerData:
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if not 0 <= size <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a frame of {size} bytes")
    return decode_to_worker_data(await reader.readexactly(size))


def _client_of(hello: Hello, writer: asyncio.StreamWriter) -> Client:
    loop = asyncio.get_running_loop()

    def send(message: FromWorkerData) -> None:
        payload = encode(message)
        loop.call_soon_threadsafe(writer.write, _LENGTH.pack(len(payload)) + payload)

    def hang_up() -> None:
        loop.call_soon_threadsafe(writer.transport.abort)

    return Client(hello.job_id, send, hang_up)
