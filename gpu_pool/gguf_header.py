"""What a GGUF file says of itself before its tensors' data: metadata and the table of tensors. No torch.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: little-endian; magic, version, counts,
then key-value pairs, then name, dimensions, type and offset of each tensor.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from gpu_pool.records import Record

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's value types that are numbers, in struct's letters."""
_STRING, _ARRAY = 8, 9
_GGML_FLOATS = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
"""Tensor types that are values; the others are quantised blocks."""
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 8

Scalar = int | float | bool | str


class GgufHeader(Record, frozen=True, kw_only=True):
    """Metadata and tensors of one file."""

    metadata: dict[str, Scalar | list[int]]
    """Numbers and strings by key, and lists of integers (such as heads by layer); other arrays are left out."""
    shapes: dict[str, tuple[int, ...]]
    """Dimensions of each tensor by name, the fastest moving first."""
    types: frozenset[str | None]
    """Types of the tensors in safetensors' names; None for quantised blocks."""

    @property
    def elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def float_type(self) -> str | None:
        """The type that the file was written in, None if it holds quantised blocks; norms stay F32 beside halves."""
        if None in self.types:
            return None
        return next((name for name in ("F64", "BF16", "F16") if name in self.types), "F32")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of the file at `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no GGUF file of a known version, or it is cut off.
    """
    with path.open("rb") as file:
        try:
            return _read(file)
        except (struct.error, EOFError, UnicodeDecodeError, MemoryError, OverflowError) as error:
            raise ValueError(f"{path} has no readable GGUF header: {error}") from error


def _read(file: BinaryIO) -> GgufHeader:
    if file.read(4) != b"GGUF":
        raise ValueError("not a GGUF file")
    version, tensors, pairs = _unpack(file, "IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version {version} is not known")
    metadata: dict[str, Scalar | list[int]] = {}
    for _ in range(pairs):
        key = _string(file)
        (kind,) = _unpack(file, "I")
        if (value := _value(file, kind)) is not None:
            metadata[key] = value
    shapes: dict[str, tuple[int, ...]] = {}
    types: set[str | None] = set()
    for _ in range(tensors):
        name = _string(file)
        (count,) = _unpack(file, "I")
        if count > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {count} dimensions")
        shapes[name] = _unpack(file, f"{count}Q")
        kind, _offset = _unpack(file, "IQ")
        types.add(_GGML_FLOATS.get(kind))
    return GgufHeader(metadata=metadata, shapes=shapes, types=frozenset(types))


def _value(file: BinaryIO, kind: int) -> Scalar | list[int] | None:
    if kind in _SCALARS:
        return _unpack(file, _SCALARS[kind])[0]
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        raise ValueError(f"GGUF value type {kind} is not known")
    inner, count = _unpack(file, "IQ")
    if inner in _SCALARS:
        numbers = _unpack(file, f"{count}{_SCALARS[inner]}")
        return list(numbers) if _SCALARS[inner] in "BbHhIiQq" else None
    for _ in range(count):  # strings, or arrays in turn: only to get past them
        _value(file, inner)
    return None


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return _bytes(file, length).decode("utf-8", errors="replace")


def _unpack(file: BinaryIO, letters: str) -> tuple[int, ...]:
    layout = struct.Struct(f"<{letters}")
    return layout.unpack(_bytes(file, layout.size))


def _bytes(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("it is cut off")
    return data
