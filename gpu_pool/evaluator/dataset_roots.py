"""The operator's `dataset_roots`: hub data sets read from local files, so that unmodified tasks run without the hub.

A key names what is mapped, the more exact key wins:
    "allenai/ai2_arc"                        every configuration of the data set
    "allenai/ai2_arc:ARC-Easy"               one configuration ("baber/piqa" or "baber/piqa:default" where it has none)
    "allenai/ai2_arc:ARC-Easy:validation"    one split

A value is a path; `{config}` and `{split}` in it stand for those names:
    "/data/arc/{config}/{split}.parquet"     one file a split
    "/data/arc/{config}"                     a folder with one file (validation.parquet, test-00000-of-00002.parquet…)
                                             or one folder a split, a `save_to_disk` folder, or a copy of the hub's
                                             repository (<config>/…, data/…)
    "/data/arc-easy.jsonl"                   a file, for a key that names the split
Files are Parquet, Arrow, JSON (lines or one list) or CSV/TSV, the last two also gzipped.

A key without a configuration serves a named one only through `{config}` or a folder of that name: never another's data.
A split that is not there stays absent, and asking for it is an error that names it: never another split.
"""

# pyright: basic
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import msgspec

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.data_files import DatasetShelf, SplitFiles, format_of

_load_from_elsewhere = datasets.load.load_dataset
_SHARD = re.compile(r"(?P<split>[\w.]+?)(-\d{5}-of-\d{5}(-\w+)?)?\.(parquet|arrow|(json|jsonl|ndjson|csv|tsv)(\.gz)?)")
_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


class DatasetRootError(PoolError):
    """A data set of `dataset_roots` cannot be read."""


class MissingSplit(PoolError):
    """The local files of a data set lack a split that a task needs."""


class LocalSplits(datasets.DatasetDict):
    """The splits that are there; asking for another raises MissingSplit."""

    def __init__(self, splits: dict[Any, datasets.Dataset], local: LocalDataset) -> None:
        super().__init__(splits)
        self._local = local

    def __missing__(self, split: str) -> datasets.Dataset:
        raise MissingSplit(self._local.lacks(split))


@dataclass(frozen=True)
class LocalDataset:
    """Where one configuration of a data set lies."""

    name: str
    """"allenai/ai2_arc:ARC-Easy", for messages."""
    splits: dict[str, SplitFiles]
    folder: Path | None
    """The mapped folder, where it is one."""

    def lacks(self, split: str) -> str:
        """A sentence for the user: this split is not there."""
        found = ", ".join(sorted(self.splits)) or "none"
        return f"the local files of {self.name} (dataset_roots) have no split {split!r}; they have: {found}"


@dataclass(frozen=True)
class _Root:
    dataset: str
    config: str | None
    split: str | None
    value: str

    @classmethod
    def parse(cls, key: str, value: str) -> _Root:
        dataset, config, split = (*key.split(":", 2), "", "")[:3]
        return cls(dataset, config or None, split or None, value)

    def serves(self, dataset: str, config: str | None) -> bool:
        if self.dataset != dataset or self.config not in (None, config or "default"):
            return False
        return self.config is not None or config is None or "{config}" in self.value or self._path(config).is_dir()

    def splits(self, config: str | None) -> dict[str, SplitFiles]:
        path = self._path(config)
        if "{split}" in str(path):
            return _split_pattern(str(path))
        if not path.exists():
            raise DatasetRootError(f"dataset_roots maps {self.dataset} to {path}, which does not exist")
        if self.split is not None:
            return {self.split: _all_files(path)}
        return _folder_splits(path) if path.is_dir() else {_split_name(path): SplitFiles.of([path])}

    def folder(self, config: str | None) -> Path | None:
        path = self._path(config)
        return path if self.split is None and path.is_dir() else None

    def _path(self, config: str | None) -> Path:
        text = self.value.replace("{config}", config or "default")
        if self.split is not None:
            text = text.replace("{split}", self.split)
        path = Path(text).expanduser()
        if self.config is None and config is not None and "{config}" not in self.value:
            return path / config
        return path


class DatasetRoots:
    """Finds and loads mapped data sets; everything else goes to `datasets.load_dataset`."""

    def __init__(self, roots: Mapping[str, str], cache_dir: Path) -> None:
        """`cache_dir` takes what JSON and CSV files are converted to."""
        self._roots = [_Root.parse(key, value) for key, value in roots.items()]
        self._roots.sort(key=lambda root: (root.config is not None, root.split is not None))
        self._shelf = DatasetShelf(cache_dir)

    def install(self) -> None:
        """Put `load_dataset` in the place of `datasets.load_dataset`, for this whole process."""
        datasets.load_dataset = self.load_dataset

    def find(self, dataset: str, config: str | None) -> LocalDataset | None:
        """Where the data set lies, or None when it is not mapped.

        Raises:
            DatasetRootError: it is mapped to something that is not there.
        """
        splits: dict[str, SplitFiles] = {}
        folder: Path | None = None
        roots = [root for root in self._roots if root.serves(dataset, config)]
        for root in roots:
            splits |= root.splits(config)
            folder = root.folder(config) or folder
        if not roots:
            return None
        name = f"{dataset}:{config}" if config else dataset
        if not splits:
            raise DatasetRootError(f"dataset_roots maps {name} to {roots[-1].value}, where no data file is found")
        return LocalDataset(name, splits, folder)

    def rows(self, dataset: str, config: str | None, split: str) -> int | None:
        """How many rows a split of mapped files has, where their headers tell."""
        if all(root.dataset != dataset for root in self._roots):
            return None
        try:
            local = self.find(dataset, config)
            return local.splits[split].rows() if local and split in local.splits else None
        except (PoolError, OSError, ValueError):  # said when the task is asked for
            return None

    def load_dataset(self, path: str, name: str | None = None, **kwargs: Any) -> Any:
        """As `datasets.load_dataset`.

        Raises:
            DatasetRootError: mapped, but not readable.
            MissingSplit: `split` is not among the local files.
        """
        local = self.find(path, name)
        if local is None:
            return self._shelf.remote(_load_from_elsewhere, path, name, kwargs)
        if kwargs.get("data_files") or kwargs.get("data_dir"):
            return _load_chosen_files(local, kwargs)
        features, split = kwargs.get("features"), kwargs.get("split")
        if split is not None:
            return self._read(local, str(split), features)
        return LocalSplits({split: self._read(local, split, features) for split in local.splits}, local)

    def _read(self, local: LocalDataset, split: str, features: datasets.Features | None) -> datasets.Dataset:
        if split not in local.splits:
            raise MissingSplit(local.lacks(split))
        files = local.splits[split]
        try:
            data = self._shelf.local(split, files)
        except Exception as error:  # damaged files raise whatever their format's reader does
            where = files.paths[0] if files.paths else "no file"
            raise DatasetRootError(f"{local.name}: split {split!r} cannot be read from {where}: {error}") from error
        return data.cast(features) if features is not None else data


def _load_chosen_files(local: LocalDataset, kwargs: dict[str, Any]) -> Any:
    """A task that names files inside the data set gets them from a local copy of its repository."""
    if local.folder is None:
        raise DatasetRootError(f"a task names files of {local.name}: map it to a folder that is a copy of the data set")
    kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "token")}
    return _load_from_elsewhere(str(local.folder), **kwargs)


# ---------------------------------------------------------------- from folders to splits


def _split_pattern(pattern: str) -> dict[str, SplitFiles]:
    """The splits for which the path `pattern`, with the split's name in place of {split}, exists."""
    before, _, after = pattern.partition("{split}")
    inside = re.escape(before) + r"(?P<split>[\w.]+?)" + re.escape(after).replace(re.escape("{split}"), "(?P=split)")
    folder = before[: before.rfind("/") + 1]
    found: dict[str, SplitFiles] = {}
    for path in sorted(Path(folder or ".").glob(pattern.removeprefix(folder).replace("{split}", "*"))):
        match = re.fullmatch(inside, str(path))
        if match and (path.is_dir() or format_of(path)):
            found[match["split"]] = _all_files(path)
    return found


def _folder_splits(folder: Path) -> dict[str, SplitFiles]:
    if (folder / "dataset_dict.json").is_file():
        names = msgspec.json.decode((folder / "dataset_dict.json").read_bytes())["splits"]
        return {name: _all_files(folder / name) for name in names}
    if (folder / "state.json").is_file():
        return {_saved_split(folder): _all_files(folder)}
    shards: dict[str, list[Path]] = {}
    for path in _data_files(folder):
        if match := _SHARD.fullmatch(path.name):
            shards.setdefault(match["split"], []).append(path)
    splits = {split: SplitFiles.of(paths) for split, paths in shards.items()}
    for child in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "data"):
        files = _all_files(child)
        if files.paths and child.name not in splits:
            splits[child.name] = files
    return splits or (_folder_splits(folder / "data") if (folder / "data").is_dir() else {})


def _all_files(path: Path) -> SplitFiles:
    """The data files of a folder that holds one split, or the file itself."""
    if path.is_file():
        return SplitFiles.of([path])
    if (path / "state.json").is_file():
        state = msgspec.json.decode((path / "state.json").read_bytes())
        return SplitFiles.of([path / item["filename"] for item in state["_data_files"]])
    return SplitFiles.of(child for child in _data_files(path) if format_of(child))


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in _METADATA)


def _saved_split(folder: Path) -> str:
    split = msgspec.json.decode((folder / "state.json").read_bytes()).get("_split")
    if not split:
        raise DatasetRootError(f"{folder} does not say which split it is: name it in the key of dataset_roots")
    return str(split)


def _split_name(path: Path) -> str:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        raise DatasetRootError(f"{path} is no data file (Parquet, Arrow, JSON or CSV)")
    return match["split"]
