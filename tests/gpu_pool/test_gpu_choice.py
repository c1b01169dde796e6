"""Allow- and deny-lists."""

from __future__ import annotations

import pytest

from gpu_pool.errors import PoolError
from gpu_pool.gpu_choice import FoundGpu, GpuChoice
from gpu_pool.hardware import Gpu


def found(index: str, uuid: str, parent: str | None = None) -> FoundGpu:
    gpu = Gpu(uuid=uuid, index=index, name="x", total_bytes=1, free_bytes=1, visible_device=index)
    return FoundGpu(gpu=gpu, parent_uuid=parent or uuid)


BOX = [
    found("0", "GPU-aa1"),
    found("1", "GPU-ab2"),
    found("2:0", "MIG-c1", "GPU-cc3"),
    found("2:1", "MIG-c2", "GPU-cc3"),
]


def indices(choice: GpuChoice) -> list[str]:
    return [gpu.index for gpu in choice.among(BOX)]


@pytest.mark.parametrize(
    ("allow", "deny", "left"),
    [
        ((), (), ["0", "1", "2:0", "2:1"]),
        (("0", "2:1"), (), ["0", "2:1"]),
        (("2,GPU-ab",), (), ["1", "2:0", "2:1"]),
        ((), ("GPU-cc3",), ["0", "1"]),
        (("0", "1"), ("1",), ["0"]),
        ((), ("MIG-c1", " 0 "), ["1", "2:1"]),
        (("5",), (), []),
    ],
)
def test_what_is_allowed_and_not_denied_may_be_used(
    allow: tuple[str, ...], deny: tuple[str, ...], left: list[str]
) -> None:
    assert indices(GpuChoice.of(None, allow, deny)) == left


def test_cuda_visible_devices_counts_as_well() -> None:
    assert indices(GpuChoice.of("1,2", ["0", "1"], [])) == ["1"]


def test_an_entry_that_names_none_or_several_is_told_with_what_there_is() -> None:
    unknown = GpuChoice.of(None, ["7", "1"], ["GPU-a"]).unknown(BOX)
    assert len(unknown) == 2
    assert unknown[0].startswith("allow_gpus: '7' names no GPU of this machine; there are 0 (GPU-aa1), 1 (GPU-ab2)")
    assert unknown[1].startswith("deny_gpus: 'GPU-a' names several GPUs")


@pytest.mark.parametrize("name", ["first", "-1", "1.5", "gpu-aa1", "0-3"])
def test_an_entry_that_can_name_nothing_is_an_error(name: str) -> None:
    with pytest.raises(PoolError, match=r"deny_gpus: .* is neither a position in PCI order"):
        GpuChoice.of(None, [], [name])


def test_why_none_is_left() -> None:
    assert "the driver shows none" in GpuChoice().why_none([])
    assert "CUDA_VISIBLE_DEVICES='9'" in GpuChoice(visible_devices="9").why_none(BOX)
    assert "allow_gpus and deny_gpus leave none of the 4" in GpuChoice(allow=("9",)).why_none(BOX)
