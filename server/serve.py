"""Running the server: one line that says where, and an end within seconds of SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Generator

import uvicorn

from gpu_pool.errors import PoolError
from gpu_pool.pool import Pool
from server.app import create_app
from server.settings import Settings

REQUESTS_GRACE_SECONDS = 2
"""Time that open requests get at the end, before the pool is stopped."""


class _Server(uvicorn.Server):
    """Ends on SIGTERM and SIGINT by returning, so that the pool can be stopped after it.

    uvicorn's own handling raises the signal again at the end, which would kill the process first.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            print(f"evalpool is ready; API documentation: {_url(listener)}/docs", flush=True)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError when the address is taken, PoolError when the pool cannot start."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    listener = _listen(settings.host, settings.port)
    pool = Pool(settings.pool)
    app = create_app(settings, pool)
    config = uvicorn.Config(
        app,
        lifespan="off",  # run here, so that its errors and its end are ours
        access_log=False,
        log_level="warning",
        log_config=None,
        timeout_graceful_shutdown=REQUESTS_GRACE_SECONDS,
    )
    try:
        async with app.lifespan():
            # What has been loaded by now stays. Looking through it for garbage would stop all answers for some 60 ms.
            gc.collect()
            gc.freeze()
            await _Server(config).serve(sockets=[listener])
    except ExceptionGroup as group:  # Litestar's task group puts one around whatever its lifespan raises
        raise group.exceptions[0] from None
    if pool.failure is not None:
        raise PoolError(f"The pool failed and the server stopped: {pool.failure}")


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything else starts: a taken address must not cost a pool."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol by its number: asyncio turns off Nagle only where it sees it, and each answer would take 40 ms more
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.set_inheritable(False)
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
