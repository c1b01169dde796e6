"""Waits for the files of a model that are missing, half written or being replaced, as by training that goes on.

Whoever submits a job is told at once what is wrong with its model. Once it is admitted, its files may be overwritten at
any moment, by somebody who knows nothing of it: then it waits until they are whole again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from gpu_pool.daemon_thread import in_daemon_thread
from gpu_pool.errors import InvalidRequest, PoolError
from gpu_pool.fingerprint import FileState, is_of_hub, model_state
from gpu_pool.model_arguments import in_our_words
from gpu_pool.models import is_kind
from gpu_pool.records import Evaluation, Job, ModelArgs

REST_SECONDS = 2.0
"""Files are looked at again when nothing has been written to them for so long."""
POLL_SECONDS = 0.5

LookT = TypeVar("LookT")


class NobodyWaits(PoolError):
    """The jobs that the model is for have ended."""


class Settling:
    """The files of one model, as long as jobs wait for it."""

    def __init__(self, args: ModelArgs | None, patience_s: float, is_awaited: Callable[[], bool]) -> None:
        """`args` say where the files are; None: nowhere here, and nothing is waited for."""
        self._args = args
        self._patience_s = patience_s
        self._is_awaited = is_awaited
        self.reason: str | None = None
        """Why the files are waited for, for people; None while they are not."""

    async def rest(self) -> None:
        """Return when nobody writes to them, or has done so for `patience_s`. Raises NobodyWaits."""
        if self._args is None:
            return
        files = await self._look_at(self._args)
        written_ns = max((file[4] for file in files.values()), default=0)
        if (time.time_ns() - written_ns) / 1e9 < REST_SECONDS:
            self.reason = "The files of its model are being written."
            watch, began = _Watch(files), time.monotonic()
            while watch.rested_s < REST_SECONDS and time.monotonic() - began < self._patience_s:
                await self._poll(watch, self._args)
            self.reason = None

    async def whole(self, look: Callable[[], Awaitable[LookT]]) -> LookT:
        """What `look` returns, which is asked again each time that the files have changed and rest.

        Raises what `look` did last, when nothing was written for `patience_s`, and NobodyWaits.
        """
        while True:
            watch = None if self._args is None else _Watch(await self._look_at(self._args))
            try:
                found = await look()
            except (InvalidRequest, OSError) as error:
                if self._args is None or watch is None:
                    raise
                await self._change(watch, self._args, error)
            else:
                self.reason = None
                return found

    async def _change(self, watch: _Watch, args: ModelArgs, error: InvalidRequest | OSError) -> None:
        """Return when the files are others than at the beginning of the watch, and nobody writes any more."""
        limit = f"{self._patience_s:g} s (setting model_patience_s)"
        self.reason = f"{error}. The job waits until its files change, and fails if they do not for {limit}."
        watch.begin()
        while not (watch.changed and watch.files and watch.rested_s >= REST_SECONDS):
            if watch.rested_s >= self._patience_s:
                problem = f"{_problem(error)}; its files have not changed for {limit}"
                raise InvalidRequest(getattr(error, "field", "model"), problem) from error
            await self._poll(watch, args)

    async def _poll(self, watch: _Watch, args: ModelArgs) -> None:
        await asyncio.sleep(POLL_SECONDS)
        if not self._is_awaited():
            raise NobodyWaits
        watch.see(await self._look_at(args))

    async def _look_at(self, args: ModelArgs) -> dict[Path, FileState]:
        return await in_daemon_thread(partial(model_state, args), "model files")


class _Watch:
    """What files were like at each look, and for how long they rest."""

    def __init__(self, files: dict[Path, FileState]) -> None:
        self.files = files
        self.changed = False
        self.begin()

    def begin(self) -> None:
        """They rest from now on, as far as is known."""
        self._since = time.monotonic()

    def see(self, files: dict[Path, FileState]) -> None:
        """One look."""
        if files != self.files:
            self.files, self.changed = files, True
            self.begin()

    @property
    def rested_s(self) -> float:
        return time.monotonic() - self._since


def _problem(error: InvalidRequest | OSError) -> str:
    return error.problem if isinstance(error, InvalidRequest) else str(error)


def local_files(job: Job) -> ModelArgs | None:
    """Where the files of a job's model are; None where it names none of this machine."""
    if job.evaluation.merge is not None:  # what a merge has written is whole
        return None
    if job.model is not None:
        args, is_local = job.model.args, job.model.api is None and not is_of_hub(job.model.fingerprint)
    else:
        args = _named(job.evaluation)
        is_local = os.path.isabs(args.pretrained)
    return args if is_local or model_state(args) else None


def _named(evaluation: Evaluation) -> ModelArgs:
    """What the request says of where files are."""
    values = in_our_words(evaluation.model_args)

    def said(key: str) -> str | None:
        value = values.get(key)
        return value if isinstance(value, str) else None

    return ModelArgs(
        pretrained=(said("pretrained") or "") if is_kind(evaluation.model) else evaluation.model,
        peft=said("peft"),
        tokenizer=said("tokenizer"),
        subfolder=said("subfolder"),
        gguf_file=said("gguf_file"),
    )
