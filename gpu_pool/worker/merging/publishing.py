"""Moves a merged checkpoint from its hidden folder to its place, so that at no moment a part of it looks like all.

A new place comes to be by one rename. In a folder that is there already, the weights' index, or the only file of
weights, is what makes a checkpoint of the rest: the old one goes first and the new one comes last, and who finds a
folder in between finds no weights that can be loaded. Its mark says that it is not whole until then.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from gpu_pool.merge import MARK, Mark, file_states
from gpu_pool.whole_file import sync_folder

_INDEX_SUFFIX = ".index.json"


def publish(staging: Path, output: Path, weights: list[Path], mark: Mark) -> None:
    """Make the content of `staging` the checkpoint in `output`; `weights` are files in it. Raises OSError."""
    whole = msgspec.structs.replace(mark, weights=file_states(weights))
    if output.is_dir():
        _write_mark(output, mark)
        _move_into(staging, output, {path.name for path in weights})
        _write_mark(output, whole)
    else:
        _write_mark(staging, whole)
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(output)
    sync_folder(output)
    sync_folder(output.parent)


def _move_into(staging: Path, output: Path, weights: set[str]) -> None:
    new = sorted(path for path in staging.iterdir() if path.name not in weights)
    shards = sorted(staging / name for name in weights)
    [*shards, last] = sorted(shards, key=lambda path: path.name.endswith(_INDEX_SUFFIX))
    for stale in _stale_weights(output, replaced=None if new else last.name):
        stale.unlink()
    sync_folder(output)
    for path in (*new, *shards):
        path.rename(output / path.name)
    sync_folder(output)
    last.rename(output / last.name)


def _stale_weights(output: Path, replaced: str | None) -> list[Path]:
    """The safetensors that are there, their index first; a single file that is `replaced` at once stays.

    Weights in other formats stay, too: transformers prefers safetensors.
    """
    patterns = ("model.safetensors.index.json", "model.safetensors", "model-?????-of-?????.safetensors")
    found = [path for pattern in patterns for path in output.glob(pattern)]
    return [path for path in found if path.name != replaced or path.name.endswith(_INDEX_SUFFIX)]


def _write_mark(folder: Path, mark: Mark) -> None:
    temporary = folder / f"{MARK}.part"
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(mark))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MARK)
