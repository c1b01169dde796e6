"""Checkpoints saved by two real FSDP ranks, merged; and what is refused."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from gpu_pool.errors import InvalidRequest
from gpu_pool.merge import CheckpointNotFound, NotMergeable, merge_checkpoint

pytestmark = pytest.mark.slow

MAKE_SHARDS = Path(__file__).parents[1] / "make_sharded_checkpoint.py"


@pytest.fixture(scope="module", params=["rank-files", "distcp"])
def sharded(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model`, as trainers on two ranks save it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-10"
    command = [sys.executable, MAKE_SHARDS, tiny_model, folder, request.param]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def assert_same_model(merged: Path, original: Path) -> None:
    weights, expected = load_file(merged / "model.safetensors"), load_file(original / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (original / name).read_bytes()


async def test_merged_weights_are_the_models(sharded: Path, tiny_model: Path, tmp_path: Path):
    stale = tmp_path / "out" / "model-00001-of-00002.safetensors"
    stale.parent.mkdir()
    stale.touch()
    assert await merge_checkpoint(sharded, tmp_path / "out", "regular", [tmp_path]) == tmp_path / "out"
    assert_same_model(tmp_path / "out", tiny_model)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == ["model.safetensors"]


async def test_in_place_and_the_latest_of_several(sharded: Path, tiny_model: Path, tmp_path: Path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-last"):
        shutil.copytree(sharded, tmp_path / name)
    merged = await merge_checkpoint(tmp_path, None, "regular", [])
    assert merged == tmp_path / "checkpoint-10"
    assert_same_model(merged, tiny_model)


async def test_a_moving_average(sharded: Path, tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(sharded, folder)
    with pytest.raises(NotMergeable, match="pytorch_ema_model_fsdp_0"):
        await merge_checkpoint(folder, None, "ema", [])
    (folder / "pytorch_model_fsdp_0").rename(folder / "pytorch_ema_model_fsdp_0")
    assert_same_model(await merge_checkpoint(folder, None, "ema", []), tiny_model)


async def test_output_outside_the_roots(sharded: Path, tmp_path: Path):
    with pytest.raises(InvalidRequest, match="output_path"):
        await merge_checkpoint(sharded, tmp_path / "out", "regular", [tmp_path / "elsewhere"])
    assert list(tmp_path.iterdir()) == []


async def test_no_checkpoint(tmp_path: Path, tiny_model: Path):
    with pytest.raises(CheckpointNotFound, match="nope not found"):
        await merge_checkpoint(tmp_path / "nope", None, "regular", [])
    with pytest.raises(NotMergeable, match="no regular shards"):
        await merge_checkpoint(tiny_model, None, "regular", [])


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [".metadata", "model_world_size_1_rank_0.pt"])
async def test_a_checkpoint_cannot_run_code(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "created")))
    with pytest.raises(NotMergeable):
        await merge_checkpoint(tmp_path, None, "regular", [])
    assert not (tmp_path / "created").exists()
    assert not list(tmp_path.glob("*.safetensors"))
