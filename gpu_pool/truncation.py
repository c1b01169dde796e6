"""How long a file of sound or video is by its own header: one that ends sooner has been cut off.

FFmpeg reads such a file to where it ends, and is content. Of the containers that state their length, WAV and AVI (RIFF)
and Matroska and WebM (EBML) are read here; FFmpeg itself misses the rest of an MP4 or an AVI.
"""

from __future__ import annotations

import io
from typing import BinaryIO

_LEAST_SHARE = 0.99
"""Of the stated length: headers may be a little wrong."""
_MOST_OF_RIFF = 0x7FFF0000
"""Longer ones are written for "not known" by what writes into a pipe."""
_SEGMENT = bytes.fromhex("18538067")
_EBML = bytes.fromhex("1a45dfa3")


def is_cut_off(file: BinaryIO) -> bool:
    """Whether the header says clearly more bytes than there are. The file is left at its beginning."""
    stated = _stated(file)
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    return stated is not None and length < _LEAST_SHARE * stated


def _stated(file: BinaryIO) -> int | None:
    """Bytes that the header says; None if it does not."""
    start = file.read(8)
    if start[:4] == b"RIFF":
        size = int.from_bytes(start[4:], "little")
        return 8 + size if size < _MOST_OF_RIFF else None
    if start[:4] != _EBML:
        return None
    file.seek(len(_EBML))
    header = _ebml_size(file)
    if header is None:
        return None
    file.seek(header, io.SEEK_CUR)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return None
    size = _ebml_size(file)
    return None if size is None else file.tell() + size


def _ebml_size(file: BinaryIO) -> int | None:
    """A number as EBML writes sizes: as many zeros as further bytes come first, then a one, then its bits.

    None: it is not known, all bits are ones.
    """
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    bits = 7 * (more + 1)
    value = int.from_bytes(first + file.read(more), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value
