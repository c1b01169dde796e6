"""Which tasks, groups and tags there are: lm-eval's index, without the configurations, kept on disk.

Parsing the 14,000 YAML files of the library takes seconds; names, kinds and file paths load in some 50 ms, and
lm-eval's factory reads the YAML of what it builds anyway. lmms-eval's folder is indexed in the same way, without
importing it: that takes seconds, and reads each of its files again.
"""

# pyright: basic
from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
import msgspec
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from gpu_pool.evaluator.failures import explain
from gpu_pool.evaluator.package_files import package_folder
from gpu_pool.evaluator.task_modality import lm_eval_modality, lmms_eval_modality
from gpu_pool.records import Modality
from gpu_pool.whole_file import replace_file

LIBRARY_ROOT = Path(lm_eval.tasks.__file__).parent
_LMMS_EVAL = package_folder("lmms_eval")
LMMS_EVAL_ROOT = _LMMS_EVAL and _LMMS_EVAL / "tasks"
"""lmms-eval's tasks; None where it is not installed."""
INDEX_VERSION = 3
"""Of what an index says of the same files: 3 tells images and videos of lmms-eval's tasks apart better."""
_IGNORED_FOLDERS = ("__pycache__", ".ipynb_checkpoints", ".git")
_log = logging.getLogger(__name__)


class IndexedTask(msgspec.Struct, frozen=True, array_like=True):
    """One name."""

    name: str
    kind: str
    path: str | None
    tags: tuple[str, ...]
    """Of a tag: the tasks that have it. Of others: their tags."""
    output_type: str | None
    modality: Modality | None
    dataset: str | None
    config: str | None
    split: str | None
    """Whose rows are the documents, each of them one; None where the task's own code chooses among them."""


class RootIndex(msgspec.Struct, frozen=True):
    """One folder of task YAML."""

    state: str
    """Changes when a file of the folder does, or the library."""
    tasks: tuple[IndexedTask, ...]
    broken: dict[str, str]
    """YAML files that cannot be read, and why."""


def load_index(root: Path, cache_dir: Path) -> RootIndex:
    """The index of a folder, from `cache_dir` while nothing has changed."""
    state = root_state(root)
    digest = hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]
    cached = cache_dir / f"tasks-{INDEX_VERSION}-{digest}.msgpack"
    try:
        index = msgspec.msgpack.decode(cached.read_bytes(), type=RootIndex)
        if index.state == state:
            return index
    except (OSError, msgspec.DecodeError):
        pass  # the first time, or another version's
    index = _build(root, state)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        replace_file(cached, msgspec.msgpack.encode(index))
    except OSError as error:
        _log.warning("%s cannot be written, and the index will be built again: %s", cached, error)
    return index


def library_cache(data_cache: Path) -> Path:
    """Where the library's own index is kept: with the user, so that a new data folder need not wait for it again.

    That is `$XDG_CACHE_HOME/evalpool` or `~/.cache/evalpool`; `data_cache` where that cannot be written.
    """
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evalpool"
    try:
        shared.mkdir(parents=True, exist_ok=True)
    except OSError:
        return data_cache
    return shared if os.access(shared, os.W_OK) else data_cache


def root_state(root: Path) -> str:
    """A digest of the library's version and, outside its own folder, of the names and times of all files."""
    library = "lmms_eval" if root == LMMS_EVAL_ROOT else "lm_eval"
    digest = hashlib.sha256(f"{library} {version(library)}\0{root.absolute()}\0".encode())
    if root not in (LIBRARY_ROOT, LMMS_EVAL_ROOT):
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in _IGNORED_FOLDERS)
            for name in sorted(files):
                status = os.lstat(os.path.join(folder, name))
                digest.update(f"{folder}/{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


def to_entries(indexes: Iterable[RootIndex]) -> dict[str, Entry]:
    """lm-eval's registry of several folders, the later ones winning."""
    return {
        task.name: Entry(
            name=task.name,
            kind=Kind[task.kind],
            yaml_path=Path(task.path) if task.path else None,
            tags=set(task.tags),
        )
        for index in indexes
        for task in index.tasks
    }


def _build(root: Path, state: str) -> RootIndex:
    is_lmms = root == LMMS_EVAL_ROOT
    entries: dict[str, Entry] = {}
    broken: dict[str, str] = {}
    for path in TaskIndex._iter_yaml_files(root):
        try:
            config = load_yaml(path, resolve_func=False)
            if is_lmms:
                config = _with_lmms_tags(config)
            if {"task", "group", "class"} & set(config):  # others are templates that tasks include
                TaskIndex.process_cfg(config, path, entries)
        except Exception as error:  # the user's file: whatever is wrong with it, the others are served
            broken[str(path)] = explain(error)
    modality_of = lmms_eval_modality if is_lmms else lm_eval_modality
    return RootIndex(state, tuple(_indexed(entry, modality_of) for entry in entries.values()), broken)


def _with_lmms_tags(config: dict[str, Any]) -> dict[str, Any]:
    """A task's `group` is a tag in lmms-eval, which also takes generation for granted (its TaskManager, TaskConfig)."""
    if not isinstance(config.get("task"), str):
        return config
    groups = config.get("group") or []
    tags = config.get("tag") or []
    both = [*([tags] if isinstance(tags, str) else tags), *([groups] if isinstance(groups, str) else groups)]
    rest = {key: value for key, value in config.items() if key not in ("group", "tag")}
    return {"output_type": "generate_until", **rest, "tag": both}


def _indexed(entry: Entry, modality_of: Callable[[dict[str, Any]], Modality | None]) -> IndexedTask:
    config = entry.cfg or {}
    is_plain = entry.kind == Kind.TASK and not config.get("process_docs")
    return IndexedTask(
        name=entry.name,
        kind=entry.kind.name,
        path=str(entry.yaml_path) if entry.yaml_path else None,
        tags=tuple(sorted(entry.tags)),
        output_type=_text(config.get("output_type")),
        modality=modality_of(config) if entry.kind == Kind.TASK else None,
        dataset=_text(config.get("dataset_path")) if is_plain else None,
        config=_text(config.get("dataset_name")) if is_plain else None,
        split=_text(config.get("test_split") or config.get("validation_split")) if is_plain else None,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
