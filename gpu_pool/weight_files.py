"""Which files a checkpoint's weights are read from, and what their headers say of the tensors. No torch, no weights.

A safetensors file begins with the length of a JSON object (8 bytes, little-endian) and that object: name to type, shape
and place of each tensor (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import msgspec

from gpu_pool.fingerprint import indexed_shards
from gpu_pool.records import ModelArgs, Record

TYPE_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32},
    **{"U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "C64": 64},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
"""Bits of an element, by safetensors' names of the types."""
FLOATS = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The types that a model can be loaded in: torch's names and safetensors'."""

_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"
_MOST_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""

Find = Callable[[str], Path | None]
"""The local file of that name in a checkpoint, None where it is not there."""


class Tensor(Record, frozen=True, kw_only=True):
    """One tensor of a checkpoint."""

    name: str
    type: str
    """In safetensors' words: "BF16"."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """As it is stored."""
        return self.elements * TYPE_BITS.get(self.type, 8) // 8

    @property
    def is_float(self) -> bool:
        """Whether it takes on the type that the model is loaded in."""
        return self.type in FLOATS.values()


class WeightFiles(Record, frozen=True, kw_only=True):
    """A checkpoint's weights, as far as its files tell without being read."""

    tensors: tuple[Tensor, ...] = ()
    opaque_bytes: int = 0
    """Size of pickled files, which have no header that tells their tensors."""


def read_weight_files(args: ModelArgs) -> WeightFiles | None:
    """What is known of the weights that transformers would load; None when nothing is.

    Looks into a local folder, or for a hub id at the commit `args.revision` into the cache, then asks the hub.

    Raises:
        OSError: a file cannot be read.
        ValueError: a safetensors file has no readable header.
    """
    found = _local_weights(finder(args))
    if found is None and not os.path.exists(args.pretrained) and args.subfolder is None:
        return _hub_weights(args.pretrained, args.revision)
    return found


def finder(args: ModelArgs) -> Find:
    """Where the files of the model's (sub)folder lie on this machine."""
    inner = args.subfolder or ""
    if os.path.exists(args.pretrained):
        return lambda name: path if (path := Path(args.pretrained, inner, name)).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> Path | None:
        path = try_to_load_from_cache(args.pretrained, os.path.join(inner, name), revision=args.revision)
        return Path(path) if isinstance(path, str) else None

    return cached


def read_safetensors(path: Path) -> tuple[Tensor, ...]:
    """The tensors that the header of a safetensors file lists, in its order.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no such header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file: its header would have {length} bytes")
        data = file.read(length)
    if len(data) < length:
        raise ValueError(f"{path} is not a safetensors file: its header is cut off")
    try:
        header = msgspec.json.decode(data, type=dict[str, dict[str, Any]])
        return tuple(
            Tensor(name=name, type=str(entry["dtype"]), shape=tuple(int(size) for size in entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        )
    except (KeyError, TypeError, ValueError) as error:  # what msgspec raises is a ValueError
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def read_adapter(folder: Path) -> WeightFiles:
    """The weights of a PEFT adapter; none where it has no file of the usual names.

    Raises:
        OSError, ValueError: as `read_safetensors`.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (path := folder / name).is_file():
            return _read_files([path])
    return WeightFiles()


def _local_weights(find: Find) -> WeightFiles | None:
    """What transformers would take, in its order of preference: safetensors first, one file before several."""
    for name in (_SAFETENSORS, _PICKLED):
        if (path := find(name)) is not None:
            return _read_files([path])
        if (index := find(f"{name}.index.json")) is not None:
            shards = [find(shard) for shard in sorted(indexed_shards(index))]
            present = [shard for shard in shards if shard is not None]
            return _read_files(present) if present and len(present) == len(shards) else None
    return None


def _read_files(paths: list[Path]) -> WeightFiles:
    tensors: list[Tensor] = []
    opaque = 0
    for path in paths:
        if path.suffix == ".safetensors":
            tensors += read_safetensors(path)
        else:
            opaque += path.stat().st_size
    return WeightFiles(tensors=tuple(tensors), opaque_bytes=opaque)


def _hub_weights(name: str, commit: str | None) -> WeightFiles | None:
    """What the hub says of the headers of the safetensors files; None where it cannot be reached or has none."""
    try:
        return _ask_hub(name, commit)
    except Exception:  # offline, no route, refused, no safetensors: many classes, one meaning
        return None


@lru_cache(maxsize=64)  # asked for at submission and again when the job is taken up; a commit does not change
def _ask_hub(name: str, commit: str | None) -> WeightFiles:
    from huggingface_hub import HfApi

    metadata: Any = HfApi().get_safetensors_metadata(name, revision=commit)
    return WeightFiles(tensors=tuple(_hub_tensors(metadata)))


def _hub_tensors(metadata: Any) -> Iterator[Tensor]:
    for _, file in sorted(metadata.files_metadata.items()):
        for name, tensor in file.tensors.items():
            yield Tensor(name=name, type=tensor.dtype, shape=tuple(cast("list[int]", tensor.shape)))
