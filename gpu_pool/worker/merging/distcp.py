# pyright: basic
"""Reads a folder of torch.distributed.checkpoint without running what is in it.

torch's own reader unpickles `.metadata` and, for what is no tensor, whatever else the planner asks for. Here the
metadata is unpickled by names on a list, only tensors are read, each by `torch.load(weights_only=True)` from the bytes
that the metadata says, and all that it says is checked against the files before the first is read.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from gpu_pool.merge import METADATA, SHARD_FOLDERS
from gpu_pool.records import CheckpointType
from gpu_pool.worker.merging.tensors import MergeError, TensorType, check_cover, place_of

PARTS: dict[CheckpointType, tuple[str, ...]] = {"regular": ("model",), "ema": ("ema", "ema_model", "model_ema")}
"""What trainers call the weights in the dictionary that they save, maybe beside an optimizer."""

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "StorageMeta", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("TensorProperties", "TensorStorageMetadata", "ChunkStorageMetadata")),
    (_METADATA, "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of checkpoint metadata, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in it")


class DistcpTensors:
    """The weights of one kind in a folder of `.distcp` files. Raises MergeError for what is no such thing."""

    def __init__(self, folder: Path, kind: CheckpointType) -> None:
        self._folder = folder
        metadata = _read_metadata(folder / METADATA)
        saved = metadata.state_dict_metadata
        entries = {key: entry for key, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
        names = _weights_of(_paths(entries, metadata.planner_data), kind, folder)
        self._entries = {name: (key, entries[key]) for key, name in names.items()}
        self._stored: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._check_files()
        self.types: Mapping[str, TensorType] = {
            name: TensorType(entry.properties.dtype, tuple(entry.size)) for name, (_, entry) in self._entries.items()
        }
        """As the metadata has them."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, put together from its shards."""
        key, entry = self._entries[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            part = self._read_part(self._stored[MetadataIndex(key, chunk.offsets)], name)
            if part.shape != chunk.sizes or part.dtype != whole.dtype:
                found, said = f"{list(part.shape)} {part.dtype}", f"{list(chunk.sizes)} {whole.dtype}"
                raise MergeError(f"{name}: a shard is {found}, and {METADATA} says {said}")
            whole[place_of(chunk.offsets, chunk.sizes)] = part
        return whole

    def _read_part(self, stored: _StorageInfo, name: str) -> torch.Tensor:
        path = self._folder / stored.relative_path
        with path.open("rb") as file:
            file.seek(stored.offset)
            content = io.BytesIO(file.read(stored.length))
        try:
            part = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # many classes, from zip archives to unpickling
            raise MergeError(f"{path}: what it holds of {name} is no tensor: {first_line(error)}") from error
        if not isinstance(part, torch.Tensor):
            raise MergeError(f"{path}: what it holds of {name} is no tensor but {type(part).__name__}")
        return part

    def _check_files(self) -> None:
        """The files are as long as the metadata says, whatever they hold, and each tensor is all there."""
        sizes: dict[str, int] = {}
        for stored in self._stored.values():
            self._check_file(stored, sizes)
        for name, (key, entry) in self._entries.items():
            boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            check_cover(name, tuple(entry.size), boxes)
            for offset, _ in boxes:
                stored = self._stored.get(MetadataIndex(key, offset))
                if stored is None:
                    raise MergeError(f"{self._folder / METADATA} does not say where a shard of {name} is")
                if getattr(stored, "transform_descriptors", None):
                    raise MergeError(f"{name} is compressed or encrypted; save the checkpoint without extensions")

    def _check_file(self, stored: _StorageInfo, sizes: dict[str, int]) -> None:
        file = stored.relative_path
        if Path(file).name != file:
            raise MergeError(f"{self._folder / METADATA} names {file}, which is no file beside it")
        path = self._folder / file
        if file not in sizes:
            if not path.is_file():
                raise MergeError(f"{path} is missing; {METADATA} says that it holds shards")
            sizes[file] = path.stat().st_size
        if stored.offset < 0 or stored.length < 0 or stored.offset + stored.length > sizes[file]:
            least = stored.offset + stored.length
            raise MergeError(f"{path} is truncated: it has {sizes[file]} bytes, and {METADATA} says at least {least}")


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise MergeError(f"{path} is no metadata of torch.distributed.checkpoint: {first_line(error)}") from error
    is_sound = (
        isinstance(metadata, Metadata)
        and isinstance(metadata.state_dict_metadata, dict)
        and isinstance(metadata.storage_data, dict)
        and all(isinstance(info, _StorageInfo) for info in metadata.storage_data.values())
    )
    if not is_sound:
        raise MergeError(f"{path} is no metadata of torch.distributed.checkpoint's files")
    return metadata


def _paths(entries: Mapping[str, Any], planner_data: Any) -> dict[str, tuple[str, ...]]:
    """Where each tensor was in the nested dictionary that was saved."""
    known = planner_data if isinstance(planner_data, dict) else {}
    return {key: tuple(map(str, known.get(key, (key,)))) for key in entries}


def _weights_of(paths: Mapping[str, tuple[str, ...]], kind: CheckpointType, folder: Path) -> dict[str, str]:
    """By key, the parameter's name. A folder of its own for the kind may hold nothing else, under any name."""
    is_own = folder.name == SHARD_FOLDERS[kind]
    parts = (*PARTS[kind], *PARTS["regular"]) if is_own else PARTS[kind]
    for part in parts:
        if found := {key: name for key, path in paths.items() if (name := _name_below(part, path))}:
            return found
    if paths and (is_own or kind == "regular") and all(len(path) == 1 for path in paths.values()):
        return {key: key for key in paths}
    there = ", ".join(sorted({path[0] for path in paths.values() if len(path) > 1})) or "no weights"
    raise MergeError(f"{folder} holds {there}; the {kind} weights are looked for under {' or '.join(parts)}")


def _name_below(part: str, path: tuple[str, ...]) -> str | None:
    """A parameter's name where it lies in {part: …}, or in {"app": {part: …}} as torch's examples have it."""
    for depth in (1, 2):
        if len(path) > depth and path[depth - 1] == part and not path[0].startswith("optim"):
            return ".".join(path[depth:])
    return None


def first_line(error: BaseException) -> str:
    """What an exception says, without the advice that torch adds."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
