"""Messages over a control pipe on asyncio streams, in the framing of `multiprocessing.Connection`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from gpu_pool.messages import MAX_MESSAGE_BYTES, Message, encode

_LENGTH = struct.Struct("!i")

Received = TypeVar("Received", bound=Message)


class OversizeFrame(ConnectionError):
    """A frame announced more bytes than any message has."""


class Channel(Generic[Received]):
    """The server's end of a pipe. Half a frame from a hung child blocks nobody but its own reader."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decode: Callable[[bytes], Received]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = decode

    @classmethod
    async def over(cls, connection: Connection, decode: Callable[[bytes], Received]) -> Channel[Received]:
        """Take the descriptor of a duplex `multiprocessing.Pipe()` end over; `connection` is closed. Raises OSError."""
        sock = socket.socket(fileno=os.dup(connection.fileno()))
        try:
            connection.close()
            sock.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer, decode)

    def send(self, message: Message) -> None:
        """Queue a message. One to a child that is gone is dropped: its death is reported elsewhere."""
        if not self._writer.is_closing():
            payload = encode(message)
            self._writer.write(_LENGTH.pack(len(payload)) + payload)

    async def messages(self) -> AsyncIterator[Received]:
        """Yield messages until the other end closes. Raises OversizeFrame and msgspec.DecodeError on nonsense."""
        while True:
            try:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                if not 0 <= length <= MAX_MESSAGE_BYTES:
                    raise OversizeFrame(f"a frame of {length} bytes")
                payload = await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError):
                return
            yield self._decode(payload)

    def end_input(self) -> None:
        """The other end is dead: `messages` ends after what it has sent, whoever else may hold that end open."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is closed on both sides
            sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close the pipe; what is queued may be lost."""
        self._writer.close()
