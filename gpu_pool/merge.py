"""Sharded training checkpoints: where their shards are, what may be merged, and where to. Reads no shard: no torch.

A merge is written beside its place first, in a hidden folder that is nobody's checkpoint, and moved there when it is
whole (`gpu_pool.worker.merging`). A mark in the merged folder says of which shards it was made.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from gpu_pool.errors import InvalidRequest, PoolError
from gpu_pool.records import CheckpointType, Merge, Record

SHARD_FOLDERS: dict[CheckpointType, str] = {"regular": "pytorch_model_fsdp_0", "ema": "pytorch_ema_model_fsdp_0"}
"""Where trainers on FSDP (accelerate, lmms-engine) put the shards of a checkpoint."""
METADATA = ".metadata"
"""What torch.distributed.checkpoint writes last, beside the `.distcp` files."""
RANK_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
"""What one rank saved of its model with `torch.save`: (ranks, this one)."""
MARK = ".evalpool-merge.json"
"""In a merged folder; hidden, and so no part of a model's identity (`gpu_pool.fingerprint`)."""

_DESCRIPTION_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".py"})
_NO_DESCRIPTION = frozenset({"trainer_state.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"})


class CheckpointNotFound(PoolError):
    """There is no such checkpoint."""


class NotMergeable(PoolError):
    """The checkpoint cannot be merged."""


class FileState(Record, frozen=True, kw_only=True):
    """A file, as far as its name, size and time tell one content from another."""

    name: str
    size: int
    mtime_ns: int


class Mark(Record, frozen=True, kw_only=True):
    """Of which shards a folder is the merge, and which weights were written. Without weights it is not whole."""

    shards_path: str
    max_shard_bytes: int
    shards: tuple[FileState, ...]
    weights: tuple[FileState, ...] = ()


# ---------------------------------------------------------------- what can be merged


def has_shards(folder: Path) -> bool:
    """Whether the folder is a sharded training checkpoint, as far as names tell."""
    return _holds_shards(folder) or any(_holds_shards(folder / name) for name in SHARD_FOLDERS.values())


def plan_merge(
    checkpoint: Path,
    output: Path | None,
    kind: CheckpointType,
    roots: Collection[Path],
    **options: int | tuple[str, ...],
) -> Merge:
    """What is to be merged, and where to (None: into the checkpoint itself). `options` are further fields of Merge.

    `checkpoint` may be the folder above several `checkpoint-N`: then the latest is meant.

    Raises:
        CheckpointNotFound, NotMergeable: nothing there, or nothing that can be merged.
        InvalidRequest: `output_path` is under none of `roots` and not under the checkpoint, or holds something else.
    """
    if not checkpoint.is_dir():
        raise CheckpointNotFound(f"Checkpoint {checkpoint} not found")
    source = checkpoint.resolve()
    if not has_shards(source):
        numbered = [path for path in source.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        source = max(numbered, key=lambda path: int(path.name.rpartition("-")[2]), default=source)
    shards, description = find_shards(source, kind), _find_description(source)
    return Merge(
        checkpoint_path=str(source),
        shards_path=str(shards),
        description_path=str(description),
        output_path=str(_target(output or source, source, roots)),
        checkpoint_type=kind,
        **options,  # pyright: ignore[reportArgumentType]
    )


def find_shards(source: Path, kind: CheckpointType) -> Path:
    """The folder of a checkpoint's shards, the checkpoint itself where it holds them. Raises NotMergeable."""
    name = SHARD_FOLDERS[kind]
    shards = next((folder for folder in (source / name, source) if _holds_shards(folder)), None)
    if shards is None or (kind == "ema" and shards == source and not (source / METADATA).is_file()):
        raise NotMergeable(
            f"{source} has no {kind} shards: no {name} with .distcp files and their {METADATA}, or "
            f"model_world_size_*_rank_*.pt files"
        )
    if not (shards / METADATA).is_file():
        _check_ranks(shards)
    return shards


def _holds_shards(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return METADATA in names or any(name.endswith(".distcp") or RANK_FILE.fullmatch(name) for name in names)


def _check_ranks(shards: Path) -> None:
    ranks = rank_files(shards)
    if not ranks:
        raise NotMergeable(
            f"{shards} has .distcp files but no {METADATA}, which is written last: the save has not finished"
        )
    world_size = max(ranks)[0]
    if missing := [rank for rank in range(world_size) if (world_size, rank) not in ranks]:
        raise NotMergeable(f"{shards} lacks model_world_size_{world_size}_rank_{missing[0]}.pt")


def rank_files(shards: Path) -> dict[tuple[int, int], Path]:
    """By (ranks, rank), what each saved with `torch.save`."""
    matches = ((RANK_FILE.fullmatch(path.name), path) for path in shards.iterdir())
    return {(int(match[1]), int(match[2])): path for match, path in matches if match}


def _find_description(source: Path) -> Path:
    for folder in (source, source / "huggingface"):
        if (folder / "config.json").is_file():
            return folder
    raise NotMergeable(f"{source} has no config.json; without it the merged checkpoint cannot be loaded")


def description_files(merge: Merge) -> list[Path]:
    """Configuration and tokenizer: what is to lie beside the weights. None where they lie there already."""
    folder = Path(merge.description_path)
    if folder == Path(merge.output_path):
        return []
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in _DESCRIPTION_SUFFIXES and path.name not in _NO_DESCRIPTION and path.is_file()
    ]


# ---------------------------------------------------------------- where to


def _target(output: Path, source: Path, roots: Collection[Path]) -> Path:
    """Where to write, resolved; raises InvalidRequest where that is not allowed."""
    target = output.expanduser().resolve()
    if not any(target.is_relative_to(root) for root in (source, *(root.resolve() for root in roots))):
        allowed = ", ".join(str(root) for root in (source, *roots))
        raise InvalidRequest("output_path", f"must lie under one of: {allowed} (setting output_roots)")
    if target.exists() and not target.is_dir():
        raise InvalidRequest("output_path", "is a file; name a folder")
    if target != source and target.is_dir() and any(target.iterdir()) and not (target / MARK).is_file():
        problem = "holds something that is no earlier merge; name a folder that is empty or does not exist"
        raise InvalidRequest("output_path", problem)
    return target


def staging_folder(merge: Merge, job_id: str) -> Path:
    """Where a merge is written until it is whole: a hidden folder on its output's file system."""
    output = Path(merge.output_path)
    return next(folder for folder in (output, *output.parents) if folder.is_dir()) / f".merging-{job_id}"


def remove_staging(merge: Merge, job_id: str) -> None:
    """Remove what a merge that did not end has left."""
    output = Path(merge.output_path)
    for folder in (output, *output.parents):
        shutil.rmtree(folder / f".merging-{job_id}", ignore_errors=True)


# ---------------------------------------------------------------- whether it is done


def begin_mark(merge: Merge) -> Mark:
    """The mark of a merge of the shards as they are now, without weights yet. Raises OSError."""
    folder = Path(merge.shards_path)
    shards = file_states(path for path in folder.iterdir() if _is_shard(path.name))
    return Mark(shards_path=str(folder), max_shard_bytes=merge.max_shard_bytes, shards=shards)


def file_states(paths: Iterable[Path]) -> tuple[FileState, ...]:
    """The states of files, by name. Raises OSError."""
    states = ((path.name, path.stat()) for path in sorted(paths))
    return tuple(FileState(name=name, size=state.st_size, mtime_ns=state.st_mtime_ns) for name, state in states)


def _is_shard(name: str) -> bool:
    return name == METADATA or name.endswith(".distcp") or RANK_FILE.fullmatch(name) is not None


def is_merged(merge: Merge) -> bool:
    """Whether the output is the merge of the shards as they are now."""
    output = Path(merge.output_path)
    try:
        mark = msgspec.json.decode((output / MARK).read_bytes(), type=Mark)
        weights = file_states(output / file.name for file in mark.weights)
        return bool(weights) and mark == msgspec.structs.replace(begin_mark(merge), weights=weights)
    except (OSError, msgspec.DecodeError):
        return False
