"""Token sequences as they travel: front-coded, so that what neighbours begin with in common is sent once.

(Front coding, also incremental encoding, is how sorted dictionaries are stored: Witten, Moffat & Bell, "Managing
Gigabytes", 1999, section 4.1.)
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Protocol, TypeAlias

from gpu_pool.records import Record

TOKEN_BYTES = 4
MAX_TOKENS = 1 << 25
"""Most tokens that a message may unfold to: a few kilobytes could otherwise claim any amount of memory."""


class TokenBuffer(Protocol):
    """The buffer protocol (PEP 688), here of 4-byte unsigned integers: array("I"), a numpy array of uint32."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


Tokens: TypeAlias = list[int] | tuple[int, ...] | TokenBuffer
"""One sequence of token ids."""


class MalformedSequences(ValueError):
    """Packed token sequences contradict themselves."""


class TokenSequences(Record, frozen=True, kw_only=True):
    """Some token sequences, in order; packed best when sorted."""

    shared: tuple[int, ...] = ()
    """How many leading tokens each has in common with the one before it."""
    added: tuple[int, ...] = ()
    """How many of its own follow them."""
    tokens: bytes = b""
    """Those of all sequences, one after the other, as little-endian uint32."""

    def __len__(self) -> int:
        return len(self.shared)

    @classmethod
    def pack(cls, sequences: Iterable[Tokens]) -> TokenSequences:
        """Front-code `sequences`.

        Raises:
            ValueError: a token is no unsigned 32-bit integer.
        """
        return cls.pack_bytes(map(token_bytes, sequences))

    @classmethod
    def pack_bytes(cls, sequences: Iterable[bytes]) -> TokenSequences:
        """The same of what `token_bytes` made."""
        shared: list[int] = []
        added: list[int] = []
        rests: list[bytes] = []
        previous = b""
        for sequence in sequences:
            common = common_prefix(previous, sequence)
            shared.append(common)
            added.append(len(sequence) // TOKEN_BYTES - common)
            rests.append(sequence[common * TOKEN_BYTES :])
            previous = sequence
        return cls(shared=tuple(shared), added=tuple(added), tokens=b"".join(rests))

    def unpack(self) -> list[list[int]]:
        """The sequences.

        Raises:
            MalformedSequences: this was not made by `pack`, or is too much.
        """
        self._check()
        rests = _little_endian(array("I", self.tokens)).tolist()
        sequences: list[list[int]] = []
        previous: list[int] = []
        start = 0
        for common, count in zip(self.shared, self.added, strict=True):
            previous = previous[:common] + rests[start : start + count]
            start += count
            sequences.append(previous)
        return sequences

    def _check(self) -> None:
        if len(self.shared) != len(self.added):
            raise MalformedSequences(f"{len(self.shared)} shared lengths, but {len(self.added)} added ones")
        length = total = 0
        for index, (common, count) in enumerate(zip(self.shared, self.added, strict=True)):
            if not (0 <= common <= length and count >= 0):
                raise MalformedSequences(
                    f"sequence {index} takes {common} of the {length} tokens before it and adds {count}"
                )
            length = common + count
            total += length
        if total > MAX_TOKENS:
            raise MalformedSequences(f"{total} tokens are more than the {MAX_TOKENS} that may be sent at once")
        if sum(self.added) * TOKEN_BYTES != len(self.tokens):
            raise MalformedSequences(f"{sum(self.added)} tokens are announced, but {len(self.tokens)} bytes are there")


def token_bytes(tokens: Tokens) -> bytes:
    """Tokens as little-endian uint32.

    Raises:
        ValueError: one of them is no unsigned 32-bit integer, or a buffer holds something else.
    """
    if isinstance(tokens, list | tuple):
        try:
            numbers = array("I", tokens)
        except (OverflowError, TypeError) as error:
            raise ValueError(f"token ids must be unsigned 32-bit integers: {error}") from error
    else:
        view = memoryview(tokens)
        if view.format not in ("I", "L") or view.itemsize != TOKEN_BYTES or view.ndim != 1:
            raise ValueError(f"token ids must be unsigned 32-bit integers in a row, not of format {view.format!r}")
        numbers = array("I", view.tobytes())
    return _little_endian(numbers).tobytes()


def common_prefix(one: bytes, other: bytes) -> int:
    """How many leading tokens are the same in both, by halving: each step compares a slice at the speed of memcmp."""
    equal, different = 0, min(len(one), len(other)) // TOKEN_BYTES
    if one[: different * TOKEN_BYTES] == other[: different * TOKEN_BYTES]:
        return different
    while different - equal > 1:
        middle = (equal + different) // 2
        between = slice(equal * TOKEN_BYTES, middle * TOKEN_BYTES)
        if one[between] == other[between]:
            equal = middle
        else:
            different = middle
    return equal


def _little_endian(tokens: array[int]) -> array[int]:
    """From little-endian to this machine's order, or back; changes `tokens` in place."""
    if sys.byteorder != "little":
        tokens.byteswap()
    return tokens
