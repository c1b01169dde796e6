"""Sharded training checkpoint to one that can be evaluated. The work is a child's: torch stays out of here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from gpu_pool.errors import InvalidRequest, PoolError

SHARD_FOLDERS = {"regular": "pytorch_model_fsdp_0", "ema": "pytorch_ema_model_fsdp_0"}
"""Where trainers on FSDP (accelerate, lmms-engine) put the shards of a checkpoint."""

_KEPT_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm"})
_TRAINING_FILES = frozenset({"trainer_state.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"})

_one_at_a_time = asyncio.Lock()  # a merge holds a whole model in memory


class CheckpointNotFound(PoolError):
    """There is no such checkpoint."""


class NotMergeable(PoolError):
    """The checkpoint cannot be merged."""


async def merge_checkpoint(
    checkpoint: Path, output: Path | None, kind: Literal["regular", "ema"], roots: Collection[Path]
) -> Path:
    """Merge the shards of `checkpoint` into safetensors in `output` (None: in the checkpoint itself); returns where.

    `checkpoint` may be the folder above several `checkpoint-N`: then the latest is meant.

    Raises:
        CheckpointNotFound, NotMergeable: nothing there, or nothing that can be merged.
        InvalidRequest: `output_path` is under none of `roots` and not under the checkpoint.
    """
    source, shards = await asyncio.to_thread(_find_shards, checkpoint, kind)
    target = await asyncio.to_thread(_target, output or source, source, roots)
    async with _one_at_a_time:
        await _run_child(shards, target)
    await asyncio.to_thread(_copy_description, source, target)
    return target


def _find_shards(checkpoint: Path, kind: Literal["regular", "ema"]) -> tuple[Path, Path]:
    """The checkpoint and its folder of shards."""
    if not checkpoint.is_dir():
        raise CheckpointNotFound(f"Checkpoint {checkpoint} not found")
    source = checkpoint.resolve()
    name = SHARD_FOLDERS[kind]
    if not (source / name).is_dir() and not _has_shards(source):
        numbered = [path for path in source.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        source = max(numbered, key=lambda path: int(path.name.rpartition("-")[2]), default=source)
    shards = next((folder for folder in (source / name, source) if _has_shards(folder)), None)
    if shards is None or (kind == "ema" and shards == source):
        raise NotMergeable(
            f"{source} has no {kind} shards: no {name} with .distcp files or model_world_size_*.pt files"
        )
    if not (source / "config.json").is_file():
        raise NotMergeable(f"{source} has no config.json; without it the merged checkpoint cannot be loaded")
    return source, shards


def _has_shards(folder: Path) -> bool:
    return (folder / ".metadata").is_file() or any(folder.glob("model_world_size_*_rank_0.pt"))


def _target(output: Path, source: Path, roots: Collection[Path]) -> Path:
    """Where to write, resolved; raises InvalidRequest where that is not allowed."""
    target = output.expanduser().resolve()
    if not any(target.is_relative_to(root) for root in (source, *(root.resolve() for root in roots))):
        allowed = ", ".join(str(root) for root in (source, *roots))
        raise InvalidRequest("output_path", f"must lie under one of: {allowed} (setting output_roots)")
    if target.exists() and not target.is_dir():
        raise InvalidRequest("output_path", "is a file; name a folder")
    return target


async def _run_child(shards: Path, target: Path) -> None:
    """Merge in a process of its own, which ends with this task."""
    arguments = ("-m", "gpu_pool.worker.merging", str(shards), str(target), str(os.getpid()))
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, errors = await child.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    if child.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise NotMergeable(f"{shards} could not be merged: {lines[-1] if lines else f'exit {child.returncode}'}")


def _copy_description(source: Path, target: Path) -> None:
    """Configuration and tokenizer beside the weights."""
    for file in source.iterdir():
        wanted = file.is_file() and file.suffix in _KEPT_SUFFIXES and file.name not in _TRAINING_FILES
        if wanted and source != target:
            shutil.copy2(file, target / file.name)
