"""Reads local data files into `datasets`, and keeps what was read while it is unchanged and used."""

# pyright: basic
from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

KEPT_BYTES = 1 << 30
"""Data kept in memory; memory-mapped files count too, though they cost little."""
KEPT_REMOTE = 256
"""Data sets of the hub that stay open; they are memory-mapped from the library's own cache."""
LARGE_BYTES = 256 << 20
"""Parquet files above this are converted once and memory-mapped, instead of being decoded into memory."""

_FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}


def format_of(path: Path) -> str | None:
    """The data format that a file's name says, or None."""
    return _FORMATS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, all of one format, in order."""

    format: str
    paths: tuple[Path, ...]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> SplitFiles:
        paths = tuple(paths)
        formats = {format_of(path) or path.suffix for path in paths}
        if len(formats) > 1:
            raise ValueError(f"files of one split in several formats: {', '.join(str(path) for path in paths)}")
        return cls(formats.pop() if formats else "", paths)

    def states(self) -> tuple[tuple[str, int, int, int], ...]:
        """What changes when a file does."""
        stats = [(path, path.stat()) for path in self.paths]
        return tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats)

    def rows(self) -> int | None:
        """How many there are; None where only reading all of it would tell."""
        if self.format != "parquet":
            return None
        return sum(pyarrow.parquet.read_metadata(path).num_rows for path in self.paths)


class DatasetShelf:
    """Data sets that were read, the longest unused given up first. Safe for threads."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        self._lock = threading.Lock()
        self._local: OrderedDict[Hashable, datasets.Dataset] = OrderedDict()
        self._remote: OrderedDict[Hashable, Any] = OrderedDict()

    def local(self, split: str, files: SplitFiles) -> datasets.Dataset:
        """One split from its files, read again only when they have changed."""
        key = (split, files.states())
        with self._lock:
            if key not in self._local:
                self._local[key] = _read(split, files, self._cache_dir, repr(key))
                while len(self._local) > 1 and sum(data.data.nbytes for data in self._local.values()) > KEPT_BYTES:
                    self._local.popitem(last=False)
            self._local.move_to_end(key)
            return self._local[key]

    def remote(self, load: Callable[..., Any], path: str, name: str | None, kwargs: dict[str, Any]) -> Any:
        """What `load` gives, kept for the life of the process when it is the hub's; files on disk may change."""
        if kwargs.get("data_files") or kwargs.get("data_dir") or kwargs.get("streaming") or Path(path).exists():
            return load(path, name, **kwargs)
        key = (path, name, repr(sorted(kwargs.items())))
        with self._lock:
            if key not in self._remote:
                self._remote[key] = load(path, name, **kwargs)
                if len(self._remote) > KEPT_REMOTE:
                    self._remote.popitem(last=False)
            self._remote.move_to_end(key)
            kept = self._remote[key]
        return type(kept)(kept) if isinstance(kept, dict) else kept  # a task may replace the splits of its own copy


def _read(split: str, files: SplitFiles, cache_dir: Path, identity: str) -> datasets.Dataset:
    paths: list[Any] = [str(path) for path in files.paths]
    named_split = datasets.NamedSplit(split)
    if files.format == "arrow":
        table = pyarrow.concat_tables([_read_arrow(path) for path in files.paths], promote_options="default")
    elif files.format == "parquet" and sum(path.stat().st_size for path in files.paths) <= LARGE_BYTES:
        tables = [pyarrow.parquet.ParquetFile(path).read() for path in paths]
        table = pyarrow.concat_tables(tables, promote_options="default")
    else:
        return _convert(named_split, files.format, paths, str(cache_dir))
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return datasets.Dataset(table, split=named_split, fingerprint=fingerprint)


def _read_arrow(path: Path) -> pyarrow.Table:
    source = pyarrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        return pyarrow.ipc.open_file(source).read_all()
    source.seek(0)
    return pyarrow.ipc.open_stream(source).read_all()


def _convert(split: datasets.NamedSplit, format_: str, paths: list[Any], cache_dir: str) -> datasets.Dataset:
    if format_ == "parquet":
        return datasets.Dataset.from_parquet(paths, split=split, cache_dir=cache_dir)
    if format_ == "json":
        return datasets.Dataset.from_json(paths, split=split, cache_dir=cache_dir)
    return datasets.Dataset.from_csv(paths, split=split, cache_dir=cache_dir, sep="\t" if format_ == "tsv" else ",")
