"""Calls that may never return, in threads that nothing waits for."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


def in_daemon_thread(call: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Its result; OSError when there can be no further thread now.

    Not by an executor: the interpreter would wait at its end for a call that hangs.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            tell(future.set_exception, error)
        else:
            tell(future.set_result, result)

    def tell(settle: Callable[[Any], None], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(lambda: None if future.done() else settle(value))

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:  # a limit on threads or on memory
        future.set_exception(OSError(errno.EAGAIN, str(error)))
    return future


def map_in_daemon_threads(call: Callable[[S], T], items: Iterable[S], most: int) -> dict[S, T]:
    """What `call` makes of each of the items, by this thread and up to `most` - 1 others.

    As above, the interpreter would not wait for those. Raises what the first call does that fails.
    """
    left = deque(items)
    results: dict[S, T] = {}
    problems: list[BaseException] = []

    def run() -> None:
        while left and not problems:
            try:
                item = left.popleft()
            except IndexError:  # another thread has the last one
                return
            try:
                results[item] = call(item)
            except BaseException as error:
                problems.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(most, len(left)) - 1)]
    with contextlib.suppress(RuntimeError):  # no room for another one: those that there are do it
        for thread in threads:
            thread.start()
    run()
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    if problems:
        raise problems[0]
    return results
