# pyright: basic
"""The process that merges a sharded training checkpoint: `python -m gpu_pool.worker.merging SHARDS OUTPUT PARENT_PID`.

Nothing that it reads can run code: unpickling is restricted to tensors and their descriptions.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from gpu_pool.child import die_with_parent

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
        raise pickle.UnpicklingError(f"the checkpoint's metadata names {module}.{name}, which is not allowed")


class _Reader(FileSystemReader):
    """torch's reader of `.distcp` folders, with the restricted unpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_distcp(folder: Path) -> dict[str, torch.Tensor]:
    """All model tensors of a torch.distributed.checkpoint folder, by parameter name."""
    reader = _Reader(folder)
    metadata = reader.read_metadata()
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    paths = {key: (metadata.planner_data or {}).get(key, (key,)) for key in tensors}
    if any(len(path) > 1 for path in paths.values()):  # saved as {"model": …}, maybe beside an optimizer
        paths = {key: path[1:] for key, path in paths.items() if path[0] == "model"}
    wanted = {key: tensors[key] for key in paths}
    load(wanted, storage_reader=reader, no_dist=True)
    return {".".join(map(str, path)): wanted[key] for key, path in paths.items()}


def read_rank_files(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of `model_world_size_W_rank_R.pt` files, each put where its placement in the device mesh says."""
    merged: dict[str, torch.Tensor] = {}
    world_size = len(list(folder.glob("model_world_size_*_rank_*.pt")))
    for rank in range(world_size):
        shard = torch.load(
            folder / f"model_world_size_{world_size}_rank_{rank}.pt", map_location="cpu", weights_only=True, mmap=True
        )
        for name, value in shard.items():
            if name not in merged:
                merged[name] = torch.empty(value.shape, dtype=value.dtype)
            _put(merged[name], value, rank)
    return merged


def _put(whole: torch.Tensor, value: torch.Tensor, rank: int) -> None:
    if not isinstance(value, DTensor):
        whole.copy_(value)
        return
    mesh = value.device_mesh.mesh
    coordinate = (mesh == rank).nonzero()[0].tolist()
    shape, offset = _compute_local_shape_and_global_offset(value.shape, mesh.shape, coordinate, value.placements)
    place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    whole[place] = value._local_tensor


def write(tensors: dict[str, torch.Tensor], output: Path) -> None:
    """Replace the weights in `output` by these, as safetensors; what was there stays until the new files are whole."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merging-", dir=output) as folder:
        save_torch_state_dict(tensors, folder)
        written = sorted(Path(folder).iterdir())
        for stale in output.glob("model*.safetensors*"):
            stale.unlink()
        for file in written:
            os.replace(file, output / file.name)


def main(shards: str, output: str, parent_pid: str) -> None:
    die_with_parent(int(parent_pid))
    folder = Path(shards)
    write(read_distcp(folder) if (folder / ".metadata").exists() else read_rank_files(folder), Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
