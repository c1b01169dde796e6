"""Checkpoints of torch.distributed.checkpoint for tests: saved by one process, and changed as an attacker would."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from gpu_pool.merge import plan_merge
from gpu_pool.records import Merge


def save_distcp(folder: Path, saved: dict[str, Any]) -> Path:
    """A checkpoint folder of one process, with an empty description."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with warnings.catch_warnings(action="ignore"):  # that one process saves, which is what is meant
        dcp.save(saved, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def change_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Read `.metadata`, which is our own, let `change` work on it, and write it."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def plan(folder: Path, kind: str = "regular", **options: Any) -> Merge:
    """Its merge into `merged` in it."""
    return plan_merge(folder, folder / "merged", kind, (), **options)  # pyright: ignore[reportArgumentType]


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
