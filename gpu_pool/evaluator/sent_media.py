"""Which media files a worker has: each is sent once on a connection, and again only if it had to make room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from gpu_pool.chunk_messages import ForgetMedia, Media, MediaFile

KEPT_BYTES = 64 << 20
"""Most that a worker keeps for a job, beside what the chunks that it has show: those are never forgotten too early,
because a worker looks a chunk's files up when the chunk arrives."""


class SentMedia:
    """What one connection's worker has, the longest unused first."""

    def __init__(self, read: Callable[[str], bytes | MediaFile], kept_bytes: int = KEPT_BYTES) -> None:
        """`read` gives a file, or where it is, by its digest."""
        self._read = read
        self._kept_bytes = kept_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._held = 0

    def before(self, digests: Iterable[str]) -> Iterator[Media | MediaFile | ForgetMedia]:
        """What to send before a chunk that shows these."""
        needed = list(dict.fromkeys(digests))
        for digest in needed:
            if digest in self._sizes:
                self._sizes.move_to_end(digest)
                continue
            found = self._read(digest)
            message = found if isinstance(found, MediaFile) else Media(digest=digest, data=found)
            self._sizes[digest] = len(message.data) if isinstance(message, Media) else 0
            self._held += self._sizes[digest]
            yield message
        if forgotten := tuple(self._forget(len(needed))):
            yield ForgetMedia(digests=forgotten)

    def _forget(self, needed: int) -> Iterator[str]:
        """Make room; the latest `needed` are used next."""
        while self._held > self._kept_bytes and len(self._sizes) > needed:
            digest, size = self._sizes.popitem(last=False)
            self._held -= size
            yield digest
