"""What can be merged, where to, and whether it is merged already: by the names and states of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from gpu_pool.errors import InvalidRequest
from gpu_pool.merge import (
    MARK,
    CheckpointNotFound,
    NotMergeable,
    begin_mark,
    description_files,
    file_states,
    has_shards,
    is_merged,
    plan_merge,
    remove_staging,
    staging_folder,
)
from gpu_pool.records import Merge

DISTCP = (".metadata", "__0_0.distcp", "__1_0.distcp")
RANKS = ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt")


def make_checkpoint(folder: Path, shards: Sequence[str] = DISTCP, inside: str = "pytorch_model_fsdp_0") -> Path:
    """A checkpoint with empty files of these names."""
    (folder / inside).mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name in shards:
        (folder / inside / name).touch()
    return folder


@pytest.mark.parametrize("shards", [DISTCP, RANKS])
@pytest.mark.parametrize(
    ("kind", "inside"), [("regular", "pytorch_model_fsdp_0"), ("ema", "pytorch_ema_model_fsdp_0"), ("regular", ".")]
)
def test_shards_lie_where_trainers_put_them(tmp_path: Path, shards: Sequence[str], kind: str, inside: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-3", shards, inside)
    assert has_shards(folder)
    merge = plan_merge(folder, None, kind, ())  # pyright: ignore[reportArgumentType]
    assert merge.shards_path == str((folder / inside).resolve())
    assert merge.output_path == merge.checkpoint_path == merge.description_path == str(folder)


def test_the_average_may_lie_in_a_folder_with_other_weights(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, DISTCP, ".")
    assert plan_merge(folder, None, "ema", ()).shards_path == str(folder)


def test_the_latest_of_several(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-last"):
        make_checkpoint(tmp_path / name)
    assert plan_merge(tmp_path, None, "regular", ()).output_path == str(tmp_path / "checkpoint-10")


def test_a_description_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", RANKS, ".")
    (folder / "huggingface").mkdir()
    (folder / "config.json").rename(folder / "huggingface" / "config.json")
    merge = plan_merge(folder, None, "regular", ())
    assert [path.name for path in description_files(merge)] == ["config.json"]


def test_what_describes_a_model_goes_with_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    for name in ("tokenizer.json", "chat_template.jinja", "trainer_state.json", "optimizer.pt", "notes.md"):
        (folder / name).touch()
    merge = plan_merge(folder, folder / "out", "regular", ())
    assert [path.name for path in description_files(merge)] == ["chat_template.jinja", "config.json", "tokenizer.json"]
    assert description_files(plan_merge(folder, None, "regular", ())) == []


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="nope not found"):
        plan_merge(tmp_path / "nope", None, "regular", ())


@pytest.mark.parametrize(
    ("shards", "kind", "problem"),
    [
        ((), "regular", "has no regular shards: no pytorch_model_fsdp_0"),
        (DISTCP, "ema", "has no ema shards: no pytorch_ema_model_fsdp_0"),
        (DISTCP[1:], "regular", r"has .distcp files but no .metadata, which is written last"),
        (RANKS[1:], "regular", "lacks model_world_size_2_rank_0.pt"),
        (
            ("model_world_size_4_rank_0.pt", "model_world_size_4_rank_3.pt"),
            "regular",
            "lacks model_world_size_4_rank_1",
        ),
    ],
)
def test_what_is_not_whole(tmp_path: Path, shards: Sequence[str], kind: str, problem: str) -> None:
    folder = make_checkpoint(tmp_path / "c", shards)
    with pytest.raises(NotMergeable, match=problem):
        plan_merge(folder, None, kind, ())  # pyright: ignore[reportArgumentType]


def test_a_checkpoint_without_a_description(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path / "c") / "config.json").unlink()
    with pytest.raises(NotMergeable, match=r"no config\.json"):
        plan_merge(tmp_path / "c", None, "regular", ())


def test_where_to(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "runs" / "c")
    (tmp_path / "roots" / "full").mkdir(parents=True)
    (tmp_path / "roots" / "full" / "thesis.txt").touch()
    (tmp_path / "roots" / "file").touch()
    for output, problem in [
        (tmp_path / "elsewhere", "must lie under one of: .*runs/c, .*roots"),
        (tmp_path / "roots" / ".." / "out", "must lie under one of"),
        (tmp_path / "roots" / "file", "is a file"),
        (tmp_path / "roots" / "full", "no earlier merge"),
    ]:
        with pytest.raises(InvalidRequest, match=problem) as refused:
            plan_merge(folder, output, "regular", [tmp_path / "roots"])
        assert refused.value.field == "output_path"
    for output in (folder / "merged", tmp_path / "roots" / "a" / "b"):
        assert plan_merge(folder, output, "regular", [tmp_path / "roots"]).output_path == str(output)
    (tmp_path / "roots" / "full" / MARK).touch()  # an earlier merge is replaced
    plan_merge(folder, tmp_path / "roots" / "full", "regular", [tmp_path / "roots"])


def test_a_merge_is_written_on_the_file_system_of_its_place(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    new, there = (plan_merge(folder, output, "regular", ()) for output in (folder / "a" / "b", folder))
    assert staging_folder(new, "j") == staging_folder(there, "j") == folder / ".merging-j"
    (folder / ".merging-j" / "deep").mkdir(parents=True)
    (folder / "a" / "b").mkdir(parents=True)
    assert staging_folder(new, "j") == folder / "a" / "b" / ".merging-j"
    remove_staging(new, "j")
    assert not (folder / ".merging-j").exists()


@pytest.fixture
def merged(tmp_path: Path) -> Merge:
    """A merge that is done, as its mark says."""
    folder = make_checkpoint(tmp_path / "c")
    merge = plan_merge(folder, folder / "merged", "regular", ())
    weights = folder / "merged" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    mark = msgspec.structs.replace(begin_mark(merge), weights=file_states([weights]))
    (weights.parent / MARK).write_bytes(msgspec.json.encode(mark))
    return merge


def test_a_merge_of_the_shards_as_they_are_is_known(merged: Merge) -> None:
    assert is_merged(merged)
    assert not is_merged(msgspec.structs.replace(merged, max_shard_bytes=7))


@pytest.mark.parametrize(
    "changed", ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__1_0.distcp", "merged/model.safetensors"]
)
def test_changed_files_are_no_merge_of_each_other(merged: Merge, changed: str) -> None:
    (Path(merged.checkpoint_path) / changed).write_bytes(b"something else")
    assert not is_merged(merged)


@pytest.mark.parametrize("lost", ["pytorch_model_fsdp_0/__1_0.distcp", "merged/model.safetensors", f"merged/{MARK}"])
def test_lost_files_are_no_merge(merged: Merge, lost: str) -> None:
    (Path(merged.checkpoint_path) / lost).unlink()
    assert not is_merged(merged)
