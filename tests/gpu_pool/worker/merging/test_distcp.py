"""Folders of torch.distributed.checkpoint, read without running what is in them."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from distcp_files import change_metadata, save_distcp, seeded
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from gpu_pool.records import CheckpointType
from gpu_pool.worker.merging.distcp import DistcpTensors
from gpu_pool.worker.merging.tensors import MergeError

WEIGHTS = {"a": seeded(3, 4), "b": seeded(5, dtype=torch.bfloat16), "scalar": torch.tensor(2.5), "none": seeded(0, 3)}
INDEX = MetadataIndex("model.a", torch.Size([0, 0]))


class Payload:
    """Unpickling it would create a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_distcp(tmp_path / "c", {"model": WEIGHTS, "optimizer": {"step": 3, "state": {"a": seeded(9)}}})


def read_all(folder: Path, kind: CheckpointType = "regular") -> dict[str, torch.Tensor]:
    tensors = DistcpTensors(folder, kind)
    return {name: tensors.read(name) for name in tensors.types}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_the_model_beside_an_optimizer(folder: Path) -> None:
    assert_same(read_all(folder), WEIGHTS)


def test_other_ways_to_save_a_model(tmp_path: Path) -> None:
    assert_same(read_all(save_distcp(tmp_path / "flat", WEIGHTS)), WEIGHTS)
    nested = {"app": {"model": WEIGHTS, "optim": {"model": seeded(2)}}}
    assert_same(read_all(save_distcp(tmp_path / "app", nested)), WEIGHTS)


@pytest.mark.parametrize("part", ["ema", "ema_model", "model_ema"])
def test_the_average_in_the_same_folder(tmp_path: Path, part: str) -> None:
    average = {name: value + 1 for name, value in WEIGHTS.items()}
    folder = save_distcp(tmp_path / "c", {"model": WEIGHTS, part: average})
    assert_same(read_all(folder, "ema"), average)
    assert_same(read_all(folder), WEIGHTS)


def test_a_folder_of_its_own_for_the_average(tmp_path: Path) -> None:
    assert_same(read_all(save_distcp(tmp_path / "pytorch_ema_model_fsdp_0", WEIGHTS), "ema"), WEIGHTS)


def test_no_average(folder: Path) -> None:
    with pytest.raises(MergeError, match="holds model, optimizer; the ema weights are looked for under ema or"):
        DistcpTensors(folder, "ema")


def test_metadata_that_runs_code_does_not(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(MergeError, match=r"it names \w+\.mkdir, which has no place in it"):
        DistcpTensors(folder, "regular")
    assert not (tmp_path / "ran").exists()


def test_code_deep_inside_metadata_does_not_run(folder: Path, tmp_path: Path) -> None:
    change_metadata(folder, lambda metadata: metadata.planner_data.update(hidden=Payload(tmp_path / "ran")))
    with pytest.raises(MergeError, match="has no place in it"):
        DistcpTensors(folder, "regular")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("serialise", ["torch", "pickle"])
def test_a_shard_that_runs_code_does_not(folder: Path, tmp_path: Path, serialise: str) -> None:
    payload = io.BytesIO()
    if serialise == "torch":
        torch.save(Payload(tmp_path / "ran"), payload)
    else:
        pickle.dump(Payload(tmp_path / "ran"), payload)
    (folder / "__9_0.distcp").write_bytes(payload.getvalue())
    stored = _StorageInfo("__9_0.distcp", 0, len(payload.getvalue()))
    change_metadata(folder, lambda metadata: metadata.storage_data.update({INDEX: stored}))
    with pytest.raises(MergeError, match=r"__9_0\.distcp: what it holds of a is no tensor"):
        read_all(folder)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_tensor_is_not_read(folder: Path, tmp_path: Path) -> None:
    """torch's own planner would load these bytes with `weights_only=False`."""
    payload = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), payload)
    (folder / "__9_0.distcp").write_bytes(payload.getvalue())

    def add(metadata: Any) -> None:
        metadata.state_dict_metadata["model.extra"] = BytesStorageMetadata()
        metadata.planner_data["model.extra"] = ("model", "extra")
        index = MetadataIndex("model.extra")
        metadata.storage_data[index] = _StorageInfo("__9_0.distcp", 0, len(payload.getvalue()))

    change_metadata(folder, add)
    assert_same(read_all(folder), WEIGHTS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "..", ""])
def test_files_elsewhere_are_not_read(folder: Path, path: str) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    stored = _StorageInfo(path, 0, 6)
    change_metadata(folder, lambda metadata: metadata.storage_data.update({INDEX: stored}))
    with pytest.raises(MergeError, match=r"which is no file beside it|is missing"):
        DistcpTensors(folder, "regular")


def test_a_missing_shard(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(MergeError, match=r"__0_0\.distcp is missing"):
        DistcpTensors(folder, "regular")


def test_a_truncated_shard(folder: Path) -> None:
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(MergeError, match=r"__0_0\.distcp is truncated: it has 500 bytes, and .* at least \d+"):
        DistcpTensors(folder, "regular")


def test_what_is_lost_of_an_optimizer_tells_of_a_damaged_checkpoint(folder: Path) -> None:
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MergeError, match=r"__0_0\.distcp is truncated"):
        DistcpTensors(folder, "regular")


def test_a_shard_of_another_type(folder: Path) -> None:
    def swap(metadata: Any) -> None:
        metadata.storage_data[INDEX] = metadata.storage_data[MetadataIndex("model.b", torch.Size([0]))]

    change_metadata(folder, swap)
    with pytest.raises(MergeError, match=r"a: a shard is \[5\] torch\.bfloat16, and .* \[3, 4\] torch\.float32"):
        read_all(folder)


def test_a_shard_that_is_nowhere(folder: Path) -> None:
    change_metadata(folder, lambda metadata: metadata.storage_data.pop(INDEX))
    with pytest.raises(MergeError, match="does not say where a shard of a is"):
        DistcpTensors(folder, "regular")


def test_shards_that_are_not_all_of_a_tensor(folder: Path) -> None:
    def shrink(metadata: Any) -> None:
        metadata.state_dict_metadata["model.a"].chunks[0].sizes = torch.Size([2, 4])

    change_metadata(folder, shrink)
    with pytest.raises(MergeError, match="a: its shards hold 8 elements, some twice or not all, and it has 12"):
        DistcpTensors(folder, "regular")


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"model": 1}), pickle.dumps(None)])
def test_what_is_no_metadata(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(MergeError, match=r"\.metadata is no metadata of torch\.distributed\.checkpoint"):
        DistcpTensors(folder, "regular")


def test_extensions_are_refused(folder: Path) -> None:
    def compress(metadata: Any) -> None:
        metadata.storage_data[INDEX].transform_descriptors = ["stream.zstd"]

    change_metadata(folder, compress)
    with pytest.raises(MergeError, match="compressed or encrypted"):
        DistcpTensors(folder, "regular")
