"""Checkpoints that two FSDP2 ranks trained and saved, merged: the same answers, or a clear error and nothing there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distcp_files import plan, save_distcp, seeded
from safetensors import safe_open
from safetensors.torch import load_file
from small_disk import mounted
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_pool.merge import is_merged, staging_folder
from gpu_pool.records import CheckpointType, Merge, Progress
from gpu_pool.worker.merging.merging import explain, merge
from gpu_pool.worker.merging.tensors import MergeError

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[3] / "support"
PEAK = """
import resource, sys
from pathlib import Path
from distcp_files import plan
from gpu_pool.merge import staging_folder
from gpu_pool.worker.merging.merging import merge
work = plan(Path(sys.argv[1]))
merge(work, staging_folder(work, "j"), lambda progress: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
MIB = 1 << 20


@pytest.fixture(params=["distcp_checkpoint", "rank_file_checkpoint"])
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A trained checkpoint, to be changed; what it answers lies beside it."""
    trained: Path = request.getfixturevalue(request.param)
    shutil.copy(f"{trained}.safetensors", f"{tmp_path / trained.name}.safetensors")
    return shutil.copytree(trained, tmp_path / trained.name)


def run(work: Merge) -> list[Progress]:
    """Merge; what it reports."""
    reports: list[Progress] = []
    reports.append(merge(work, staging_folder(work, "j"), reports.append))
    return reports


def assert_nothing_is_left(work: Merge) -> None:
    assert not Path(work.output_path).exists()
    assert not staging_folder(work, "j").exists()


@pytest.mark.parametrize("kind", ["regular", "ema"])
def test_the_merged_model_answers_what_the_ranks_answered(sharded: Path, kind: CheckpointType) -> None:
    work = plan(sharded, kind)
    progress = run(work)[-1]
    assert (
        progress.done
        == progress.total
        == sum(value.nbytes for value in load_file(f"{work.output_path}/model.safetensors").values())
    )
    expected = load_file(f"{sharded}.safetensors")
    assert (expected["regular"] - expected["ema"]).abs().max() > 0.1
    model = AutoModelForCausalLM.from_pretrained(work.output_path)
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"]).logits
    torch.testing.assert_close(logits, expected[kind], rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(work.output_path)("Paris").input_ids
    assert is_merged(work)


def test_weights_are_split_by_size(sharded: Path) -> None:
    limit = 100_000
    work = plan(sharded, max_shard_bytes=limit)
    run(work)
    output = Path(work.output_path)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 3
    assert {path.name for path in files} == set(index["weight_map"].values())
    found: dict[str, torch.Tensor] = {}
    for path in files:
        tensors = load_file(path)
        assert sum(value.nbytes for value in tensors.values()) <= limit
        found |= tensors
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    run(whole := plan_into(sharded, "whole"))
    expected = load_file(f"{whole.output_path}/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def plan_into(sharded: Path, name: str) -> Merge:
    shutil.copytree(sharded, sharded.parent / name, ignore=shutil.ignore_patterns("merged"))
    return plan(sharded.parent / name)


def test_a_merge_that_is_done_is_not_done_again(sharded: Path) -> None:
    work = plan(sharded)
    [*_, last] = run(work)
    before = (Path(work.output_path) / "model.safetensors").stat()
    reports = run(work)
    assert len(reports) == 1
    assert reports[0].done == reports[0].total >= last.total
    assert (Path(work.output_path) / "model.safetensors").stat() == before


def test_other_shards_are_another_merge(sharded: Path) -> None:
    work = plan(sharded)
    run(work)
    for file in Path(work.shards_path).iterdir():
        file.unlink()
    for file in (sharded / "pytorch_ema_model_fsdp_0").iterdir():
        shutil.copy(file, work.shards_path)
    run(work)
    run(average := plan_into(sharded, "average"))
    merged, expected = (load_file(f"{each.output_path}/model.safetensors") for each in (work, average))
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_a_truncated_shard(sharded: Path) -> None:
    work = plan(sharded)
    shard = max(path for path in Path(work.shards_path).iterdir() if path.name != ".metadata")
    shard.write_bytes(shard.read_bytes()[:-5000])
    with pytest.raises(MergeError, match=rf"{shard.name} is (damaged or )?truncated"):
        run(work)
    assert_nothing_is_left(work)


def test_shards_that_change_meanwhile(sharded: Path) -> None:
    work = plan(sharded)
    shard = next(path for path in Path(work.shards_path).iterdir() if path.name != ".metadata")

    def touch(_: Progress) -> None:
        shard.touch()

    with pytest.raises(MergeError, match="has changed while it was merged"):
        merge(work, staging_folder(work, "j"), touch)
    assert_nothing_is_left(work)


def test_a_disk_that_is_too_small(distcp_checkpoint: Path, tmp_path: Path) -> None:
    with mounted(tmp_path, 4 * MIB) as disk:
        folder = shutil.copytree(distcp_checkpoint, disk / "c")
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
        work = plan(folder)
        with pytest.raises(MergeError, match=r"no space .*: the merged weights are 456448 bytes, and .* has \d+ free"):
            run(work)
        assert_nothing_is_left(work)


def test_a_disk_that_fills_up_meanwhile(distcp_checkpoint: Path, tmp_path: Path) -> None:
    with mounted(tmp_path, 4 * MIB) as disk:
        folder = shutil.copytree(distcp_checkpoint, disk / "c")
        work = plan(folder, max_shard_bytes=100_000)

        def fill(_: Progress) -> None:
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))

        with pytest.raises(OSError, match="No space left") as failed:
            merge(work, staging_folder(work, "j"), fill)
        assert explain(failed.value).endswith("No space left on device")
        assert_nothing_is_left(work)
        (disk / "filler").unlink()
        run(work)
        assert is_merged(work)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    work = plan(save_distcp(tmp_path / "c", {"model": {"w": seeded(4)}}))
    Path(work.output_path).symlink_to(tmp_path / "nowhere" / "out")
    (tmp_path / "nowhere").write_text("a file")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        run(work)


@pytest.mark.parametrize(
    ("inside", "earlier"), [(False, "none"), (False, "ema"), (True, "none"), (True, "ema")], ids=str
)
def test_killed_at_any_moment_it_is_whole_or_no_checkpoint(
    distcp_checkpoint: Path, tmp_path: Path, inside: bool, earlier: str
) -> None:
    folder = shutil.copytree(distcp_checkpoint, tmp_path / "c")
    output = folder if inside else tmp_path / "out"
    command = [sys.executable, SUPPORT / "killed_merges.py", folder, output, earlier]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 10
    assert {kill["holds"] for kill in kills} == {"nothing", "regular"} | ({"ema"} if earlier == "ema" else set())
    assert all(kill["whole_again"] for kill in kills)
    assert (kills[-1]["before"], kills[-1]["holds"]) == (None, "regular")


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    few = save_distcp(tmp_path / "few", {"model": {"w": seeded(2 * MIB)}})
    many = save_distcp(tmp_path / "many", {"model": {f"w{number}": seeded(2 * MIB) for number in range(24)}})
    peaks = [peak_kib(folder) for folder in (few, many)]
    assert peaks[1] - peaks[0] < 64 * 1024  # a third of what the further tensors take
    with safe_open(many / "merged" / "model.safetensors", "pt") as merged:
        assert len(merged.keys()) == 24


def peak_kib(folder: Path) -> int:
    command = [sys.executable, "-c", PEAK, folder]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment()).stdout)


def environment() -> dict[str, str]:
    path = f"{SUPPORT.parents[1]}:{SUPPORT}"
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent)}
