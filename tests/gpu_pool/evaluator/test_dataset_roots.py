from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from gpu_pool.evaluator.dataset_roots import DatasetRootError, DatasetRoots, MissingSplit

ROWS = [{"question": f"q{i}", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": i % 2} for i in range(5)]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)


@pytest.fixture
def data() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


@pytest.fixture(autouse=True)
def no_caches_beside_the_data(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("data/**/cache-*"))


def roots(tmp_path: Path, **values: str | Path) -> DatasetRoots:
    return DatasetRoots({key: str(value) for key, value in values.items()}, tmp_path / "cache")


def of(tmp_path: Path, key: str, value: str | Path) -> DatasetRoots:
    return roots(tmp_path, **{key: value})


def write(folder: Path, name: str, rows: list[dict] = ROWS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    data = datasets.Dataset.from_list(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    match name.partition(".")[2]:
        case "parquet":
            data.to_parquet(path)
        case "jsonl":
            path.write_text(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows))
        case "csv":
            data.to_csv(path)
    return path


@pytest.mark.parametrize("format_", ["parquet", "jsonl", "jsonl.gz", "json"])
def test_files_of_every_format(tmp_path: Path, format_: str) -> None:
    write(tmp_path / "data", f"validation.{format_}")
    loaded = of(tmp_path, "org/name", tmp_path / "data").load_dataset("org/name")
    assert list(loaded) == ["validation"]
    assert loaded["validation"].to_list() == ROWS


def test_csv(tmp_path: Path) -> None:
    rows = [{"goal": "open, the door", "label": 1}]
    write(tmp_path / "data", "test.csv", rows)
    loaded = of(tmp_path, "org/name", tmp_path / "data").load_dataset("org/name")
    assert loaded["test"].to_list() == rows


def test_save_to_disk_dict(tmp_path: Path, data: datasets.Dataset) -> None:
    datasets.DatasetDict(test=data, dev=data.select([0])).save_to_disk(tmp_path / "data")
    loaded = of(tmp_path, "org/name", tmp_path / "data").load_dataset("org/name")
    assert {split: len(loaded[split]) for split in loaded} == {"test": 5, "dev": 1}
    assert loaded["test"].features == data.features
    loaded["test"].map(lambda row: {"answer": row["answer"] + 1})


def test_save_to_disk_folders_by_config_and_split(tmp_path: Path, data: datasets.Dataset) -> None:
    for config in ("algebra", "law"):
        for split in ("dev", "test"):
            data.save_to_disk(tmp_path / "data" / config / split)
    for key, value in {
        "cais/mmlu": tmp_path / "data" / "{config}" / "{split}",
        "cais/mmlu:law": tmp_path / "data" / "law",
    }.items():
        loaded = of(tmp_path, key, value).load_dataset("cais/mmlu", "law")
        assert set(loaded) == {"dev", "test"}
        assert loaded["test"].to_list() == ROWS


def test_one_saved_split_names_itself_or_is_named(tmp_path: Path, data: datasets.Dataset) -> None:
    data.save_to_disk(tmp_path / "data" / "unnamed")
    named = datasets.Dataset(data.data, split=datasets.NamedSplit("validation"))
    named.save_to_disk(tmp_path / "data" / "named")
    assert set(of(tmp_path, "org/a", tmp_path / "data/named").load_dataset("org/a")) == {"validation"}
    assert set(of(tmp_path, "org/a::test", tmp_path / "data/unnamed").load_dataset("org/a")) == {"test"}
    with pytest.raises(DatasetRootError, match="which split"):
        of(tmp_path, "org/a", tmp_path / "data/unnamed").load_dataset("org/a")


@pytest.mark.parametrize("layout", ["", "data", "law"])
def test_a_copy_of_the_hubs_repository(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "data" / "repo"
    write(folder / layout, "test-00000-of-00002.parquet", ROWS[:3])
    write(folder / layout, "test-00001-of-00002.parquet", ROWS[3:])
    (folder / "README.md").write_text("")
    config = "law" if layout == "law" else None
    loaded = of(tmp_path, "org/name", folder).load_dataset("org/name", config)
    assert loaded["test"].to_list() == ROWS


def test_a_folder_a_split(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train", "part-1.parquet", ROWS[:2])
    write(tmp_path / "data" / "train", "part-2.parquet", ROWS[2:])
    write(tmp_path / "data" / "validation", "anything.jsonl")
    loaded = of(tmp_path, "org/name", tmp_path / "data").load_dataset("org/name")
    assert {split: loaded[split].to_list() for split in loaded} == {"train": ROWS, "validation": ROWS}


def test_the_more_exact_key_wins(tmp_path: Path) -> None:
    write(tmp_path / "data" / "all" / "easy", "test.parquet")
    write(tmp_path / "data" / "all" / "easy", "validation.parquet")
    other = write(tmp_path / "data", "other.jsonl", ROWS[:1])
    values = {"org/a": tmp_path / "data" / "all", "org/a:easy:test": other}
    loaded = roots(tmp_path, **values).load_dataset("org/a", "easy")
    assert {split: len(loaded[split]) for split in loaded} == {"test": 1, "validation": 5}


def test_another_configuration_is_never_served(tmp_path: Path) -> None:
    write(tmp_path / "data", "test.parquet")
    mapped = of(tmp_path, "allenai/ai2_arc", tmp_path / "data")
    assert mapped.find("allenai/ai2_arc", "ARC-Challenge") is None
    mapped = of(tmp_path, "allenai/ai2_arc:ARC-Easy", tmp_path / "data")
    assert mapped.find("allenai/ai2_arc", "ARC-Challenge") is None
    assert mapped.find("allenai/ai2_arc", None) is None
    assert mapped.find("allenai/ai2_arc", "ARC-Easy") is not None
    assert mapped.find("allenai/other", "ARC-Easy") is None


def test_a_missing_split_is_named_and_never_replaced(tmp_path: Path) -> None:
    write(tmp_path / "data", "validation.parquet")
    mapped = of(tmp_path, "org/name", tmp_path / "data")
    with pytest.raises(MissingSplit, match=r"org/name .* no split 'test'; they have: validation"):
        mapped.load_dataset("org/name")["test"]
    with pytest.raises(MissingSplit):
        mapped.load_dataset("org/name", split="test")
    assert mapped.load_dataset("org/name", split="validation").to_list() == ROWS


def test_paths_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetRootError, match="nowhere, which does not exist"):
        of(tmp_path, "org/name", tmp_path / "nowhere").find("org/name", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetRootError, match="no data file"):
        of(tmp_path, "org/name", tmp_path / "empty").find("org/name", None)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DatasetRootError, match=r"split 'test' cannot be read from .*test\.parquet"):
        of(tmp_path, "org/name", tmp_path / "test.parquet").load_dataset("org/name")


def test_data_stays_warm_until_the_file_changes(tmp_path: Path) -> None:
    write(tmp_path / "data", "test.parquet")
    mapped = of(tmp_path, "org/name", tmp_path / "data")
    first = mapped.load_dataset("org/name")["test"]
    assert mapped.load_dataset("org/name")["test"] is first
    write(tmp_path / "data", "test.parquet", ROWS[:2])
    assert mapped.load_dataset("org/name")["test"].to_list() == ROWS[:2]


def test_unmapped_data_sets_go_to_the_library(tmp_path: Path) -> None:
    path = write(tmp_path / "data", "rows.jsonl")
    of(tmp_path, "org/name", tmp_path / "data").install()
    loaded = datasets.load_dataset("json", data_files={"test": str(path)}, cache_dir=str(tmp_path / "hub"))
    assert loaded["test"].to_list() == ROWS


def test_a_task_may_name_files_of_a_mapped_folder(tmp_path: Path) -> None:
    write(tmp_path / "data", "special.jsonl")
    mapped = of(tmp_path, "org/name", tmp_path / "data")
    files = {"test": "special.jsonl"}
    assert mapped.load_dataset("org/name", data_files=files, cache_dir=str(tmp_path / "hub"))["test"].to_list() == ROWS
