# pyright: basic
"""Prepares prompts in a thread of its own, ahead of the computation but not too far: pictures take memory."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from gpu_pool.chunk_messages import MediaFile, MediaPrompt
from gpu_pool.worker.engine.prompt_inputs import PromptInputs

AHEAD_BYTES = 512 << 20
"""Memory of what is prepared and waits for the computation."""

Files = Mapping[str, bytes | MediaFile]
"""By digest: what a file holds, or where it is."""
Prepare = Callable[[MediaPrompt, Files], PromptInputs]


class MissingMedia(Exception):
    """A prompt shows a file that was not sent before it."""


class Pending:
    """One prompt's inputs: made by the thread, or by whoever takes them first."""

    def __init__(self, prepare: Prepare, prompt: MediaPrompt, media: Files) -> None:
        self._prepare = prepare
        self._prompt = prompt
        self._media = media
        self._making = threading.Lock()
        self._made: PromptInputs | Exception | None = None
        self._is_taken = False
        self.on_gone: Callable[[], object] | None = None
        """Called, once, when the inputs are taken or nobody has them any more."""

    def make(self) -> int:
        """Prepare them, unless they are; returns the memory that they take until they are taken, in bytes."""
        with self._making:
            if self._made is None and not self._is_taken:
                try:
                    self._made = self._prepare(self._prompt, self._media)
                except Exception as error:  # raised where they are taken
                    self._made = error
            return self._made.bytes if isinstance(self._made, PromptInputs) else 0

    def take(self) -> PromptInputs:
        """The inputs; only once.

        Raises:
            MediaError: they cannot be made.
        """
        self.make()
        with self._making:
            made, self._made, self._media, self._is_taken = self._made, None, {}, True
        if self.on_gone:
            self.on_gone()
        assert made is not None, "the inputs are taken twice"
        if isinstance(made, Exception):
            raise made
        return made


class Preparation:
    """The thread, and what it has prepared so far."""

    def __init__(self, prepare: Prepare, ahead_bytes: int = AHEAD_BYTES) -> None:
        self._prepare = prepare
        self._ahead_bytes = ahead_bytes
        self._changed = threading.Condition()
        self._waiting: deque[weakref.ref[Pending]] = deque()
        self._held = 0
        self._thread: threading.Thread | None = None

    def plan(self, prompts: Sequence[MediaPrompt], media: Files) -> list[Pending]:
        """Inputs of these prompts, to be prepared after those that were planned before, as long as somebody has them.

        Raises:
            MissingMedia: one of their files is not among `media`.
        """
        missing = next((digest for prompt in prompts for digest in prompt.files if digest not in media), None)
        if missing is not None:
            raise MissingMedia(f"{MissingMedia.__doc__} ({missing})")
        pending = [
            Pending(self._prepare, prompt, {digest: media[digest] for digest in prompt.files}) for prompt in prompts
        ]
        with self._changed:
            self._waiting.extend(map(weakref.ref, pending))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="preparation", daemon=True)
                self._thread.start()
            self._changed.notify()
        return pending

    def _run(self) -> None:
        while True:
            self._make_next()  # and forget it, before the next one is waited for

    def _make_next(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting and self._held < self._ahead_bytes)
            pending = self._waiting.popleft()()
        if pending is None:
            return
        size = pending.make()
        with self._changed:
            self._held += size
        gone = pending.on_gone = weakref.finalize(pending, self._release, size)
        gone.atexit = False

    def _release(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify()
