"""What each rank saved with `torch.save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distcp_files import seeded

from gpu_pool.worker.merging.rank_files import RankTensors
from gpu_pool.worker.merging.tensors import MergeError


def save(folder: Path, *ranks: Any) -> Path:
    for rank, saved in enumerate(ranks):
        torch.save(saved, folder / f"model_world_size_{len(ranks)}_rank_{rank}.pt")
    return folder


def test_tensors_that_every_rank_has_whole(tmp_path: Path) -> None:
    weights = {"w": seeded(3, 2), "step": torch.tensor(1)}
    tensors = RankTensors(save(tmp_path, weights, weights))
    assert list(tensors.types) == ["w", "step"]
    assert torch.equal(tensors.read("w"), weights["w"])


def test_ranks_that_disagree(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="do not agree on the type or shape of w"):
        RankTensors(save(tmp_path, {"w": seeded(3)}, {"w": seeded(4)}))
    with pytest.raises(MergeError, match="rank 1 has not saved w"):
        RankTensors(save(tmp_path, {"w": seeded(3)}, {}))


def test_code_in_a_rank_file_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.mkdir, (tmp_path / "ran",)  # pyright: ignore[reportReturnType]

    with pytest.raises(MergeError, match="damaged or truncated, or holds more than tensors"):
        RankTensors(save(tmp_path, {"w": Payload()}))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_state_dictionary(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no state dictionary but list"):
        RankTensors(save(tmp_path, [1]))
