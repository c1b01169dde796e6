"""What a worker is sent of images, and when it is told to forget them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpu_pool.chunk_messages import ForgetMedia, Media
from gpu_pool.evaluator.sent_media import SentMedia


def file_of(digest: str) -> bytes:
    return digest.encode() * 10


class Worker:
    """Does what it is told."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def receive(self, message: Media | ForgetMedia) -> None:
        if isinstance(message, Media):
            assert message.digest not in self.files, "it was sent twice"
            self.files[message.digest] = message.data
            return
        for digest in message.digests:
            del self.files[digest]


@given(chunks=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6)), kept=st.integers(0, 100))
def test_a_worker_has_what_a_chunk_shows_and_not_much_more(chunks: list[list[str]], kept: int) -> None:
    sent, worker = SentMedia(file_of, kept), Worker()
    for chunk in chunks:
        for message in sent.before(chunk):
            worker.receive(message)
        assert worker.files.items() >= {digest: file_of(digest) for digest in chunk}.items()
        assert sum(map(len, worker.files.values())) <= max(kept, 10 * len(set(chunk)))


def test_what_is_shown_again_is_sent_once() -> None:
    sent = SentMedia(file_of)
    assert [message for digests in ("ab", "ba", "bc") for message in sent.before(digests)] == [
        Media(digest=digest, data=file_of(digest)) for digest in "abc"
    ]


def test_the_longest_unused_goes_first() -> None:
    sent = SentMedia(file_of, 20)
    messages = [message for digests in ("a", "b", "a", "c") for message in sent.before(digests)]
    assert messages[-1] == ForgetMedia(digests=("b",))
