"""One request to an endpoint: its key, its tries, and the pauses between them."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

import httpx

from gpu_pool.endpoints import Endpoint

LONGEST_PAUSE_SECONDS = 60.0
"""Between two tries, unless the endpoint asks for more."""
LONGEST_WISH_SECONDS = 600.0
"""For which an endpoint may ask: who has to wait longer is told so at once."""
MAX_SAID = 300
"""Characters of what an endpoint says that become part of an error."""
SHORTEST_SECRET = 8
"""Characters of a key from which on answers are searched for it: shorter ones are words such as EMPTY, which servers
that need no key are given, and which an answer may hold by itself."""
FOR_NOW = frozenset({408, 409, 425, 429})
"""Statuses after which another try may succeed, beside all from 500."""


class AskingFailed(Exception):
    """There is no answer, and why; nothing in it is secret."""


class NoKey(Exception):
    """The endpoint's key cannot be had."""


class Asker:
    """Sends requests to one endpoint, as many at once as it may get."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=endpoint.num_concurrent)
        self._client = httpx.AsyncClient(follow_redirects=False, limits=limits)
        self._slots = asyncio.Semaphore(endpoint.num_concurrent)
        self.asked = 0
        """Requests that are on their way, or pause between tries."""

    async def ask(self, body: dict[str, Any], timeout_s: float, max_retries: int) -> Any:
        """The answer's JSON, without the key where the endpoint repeats it.

        Raises:
            AskingFailed: there is none, after all tries.
        """
        async with self._slots:
            self.asked += 1
            try:
                return await self._try(body, timeout_s, max_retries)
            finally:
                self.asked -= 1

    async def _try(self, body: dict[str, Any], timeout_s: float, max_retries: int) -> Any:
        for tried in range(max_retries + 1):
            failure, wish = await self._try_once(body, timeout_s)
            if not isinstance(failure, AskingFailed):
                return failure
            if wish is None:
                raise failure
            if tried == max_retries:
                raise AskingFailed(f"{failure} (tried {tried + 1} times)") if tried else failure
            if wish > LONGEST_WISH_SECONDS:
                raise AskingFailed(f"{failure}; the endpoint asks to wait for {wish:.0f} s")
            await asyncio.sleep(self.pause(tried, wish))
        raise AssertionError("the last try returns or raises")

    def pause(self, tried: int, wish: float) -> float:
        """Seconds to wait when so many tries have failed before this one: doubled each time, and up to a half less by
        chance, lest all that failed together come again together; or as the endpoint wishes, where that is longer."""
        longest = min(LONGEST_PAUSE_SECONDS, self._endpoint.retry_pause_s * 2.0 ** min(tried, 30))
        return max(wish, longest * random.uniform(0.5, 1.0))

    async def _try_once(self, body: dict[str, Any], timeout_s: float) -> tuple[Any, float | None]:
        """The answer; or an AskingFailed, and for how long the endpoint wants to be left alone (None: for ever)."""
        try:
            key = read_key(self._endpoint)
        except NoKey as error:
            return AskingFailed(str(error)), None
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._client.post(self._endpoint.url, json=body, headers=headers, timeout=timeout_s)
        except (TimeoutError, httpx.TimeoutException):
            return AskingFailed(f"the endpoint did not answer within {timeout_s:g} s"), 0.0
        except httpx.HTTPError as error:
            said = _without(str(error), key) or type(error).__name__
            return AskingFailed(f"the endpoint could not be asked: {said}"), 0.0
        return _understood(reply, key)

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


def _understood(reply: httpx.Response, key: str | None) -> tuple[Any, float | None]:
    status = reply.status_code
    if reply.is_success:
        try:
            answer = reply.json()
        except ValueError:
            return AskingFailed("the endpoint's answer is no JSON"), None
        is_secret = key is not None and len(key) >= SHORTEST_SECRET
        return _without(answer, key) if is_secret else answer, None
    if reply.is_redirect:
        return AskingFailed(f"the endpoint answers {status}: it is elsewhere, and redirects are not followed"), None
    said = " ".join(_without(_error_message(reply), key).split())[:MAX_SAID]
    failure = AskingFailed(f"the endpoint answers {status}" + (f": {said}" if said else ""))
    if status not in FOR_NOW and status < 500:
        return failure, None
    return failure, _wish(reply.headers.get("Retry-After"), lambda: datetime.now(UTC))


def _error_message(reply: httpx.Response) -> str:
    """OpenAI's `error.message`, or the text."""
    try:
        said: Any = reply.json()["error"]
        return str(said.get("message") or said) if isinstance(said, dict) else str(said)
    except (ValueError, KeyError, TypeError):
        return reply.text


def _wish(retry_after: str | None, now: Callable[[], datetime]) -> float:
    """Seconds in a Retry-After header: a number, or a date."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after).astimezone(UTC) - now()).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def read_key(endpoint: Endpoint) -> str | None:
    """The key that belongs to an endpoint, read anew each time; None where it has none.

    Raises:
        NoKey: it is not there, or could not be part of a header.
    """
    if endpoint.key_file is not None:
        where = f"the file of its key ({endpoint.key_file})"
        try:
            key = endpoint.key_file.read_text()
        except (OSError, UnicodeDecodeError):
            raise NoKey(f"{where} cannot be read") from None
    elif endpoint.key_env is not None:
        where = f"the variable of its key ({endpoint.key_env})"
        key = os.environ.get(endpoint.key_env, "")
    else:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise NoKey(f"{where} holds no key: it must be printable ASCII")
    return key


def _without(said: Any, key: str | None) -> Any:
    """What somebody else says who may repeat what was sent, in text or decoded JSON: decoded, since JSON can write the
    same characters in many ways."""
    match said:
        case str() if key is not None:
            return said.replace(key, "[key]")
        case list():
            return [_without(one, key) for one in cast("list[Any]", said)]
        case dict():
            return {_without(name, key): _without(value, key) for name, value in cast("dict[str, Any]", said).items()}
        case _:
            return said
