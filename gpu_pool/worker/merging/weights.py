# pyright: basic
"""Writes tensors as safetensors, one after another: no more than one is in memory, however large the files.

The format: the header's length (8 bytes, little-endian), the header as JSON, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors). Files and their index are named as transformers names and reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from gpu_pool.worker.merging.tensors import MergeError, ShardedTensors, TensorType

PATTERN, INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(
    tensors: ShardedTensors, folder: Path, max_shard_bytes: int, on_written: Callable[[int], object]
) -> list[Path]:
    """Write all of them into files of at most so many bytes of tensors, where no single one is larger, and an index
    where there are several; returns the files. `on_written` is told of bytes. Raises MergeError and OSError."""
    types = tensors.types
    split = split_state_dict_into_shards_factory(
        dict(types),
        get_storage_size=lambda kind: kind.nbytes,
        filename_pattern=PATTERN,
        max_shard_size=max_shard_bytes,
    )
    for name, kind in types.items():
        if kind.dtype not in _DTYPES:
            raise MergeError(f"{name} is {kind.dtype}, which safetensors do not hold")
    written = [folder / name for name in split.filename_to_tensors]
    for path, names in zip(written, split.filename_to_tensors.values(), strict=True):
        _write_file(path, names, tensors, on_written)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        written.append(folder / INDEX)
        write_bytes(written[-1], json.dumps(index, indent=2).encode())
    return written


def _write_file(path: Path, names: Iterable[str], tensors: ShardedTensors, on_written: Callable[[int], object]) -> None:
    ordered = sorted(names, key=lambda name: -tensors.types[name].dtype.itemsize)  # so that each is aligned
    with path.open("wb") as file:
        file.write(_header(ordered, tensors.types))
        for name in ordered:
            elements = tensors.read(name).contiguous().reshape(-1)
            file.write(elements.view(torch.uint8).numpy().data)
            on_written(tensors.types[name].nbytes)
        _sync(file)


def _header(names: Iterable[str], types: Mapping[str, TensorType]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + types[name].nbytes
        dtype, shape = types[name]
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_bytes(path: Path, content: bytes) -> None:
    """A small file that is on the disk on return."""
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
