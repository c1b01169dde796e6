"""How many GPUs a replica gets, and what is refused with which numbers."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_pool.errors import InvalidRequest
from gpu_pool.hardware import Gpu
from gpu_pool.model_size import ReplicaSize
from gpu_pool.replica_plan import ReplicaPlan, fewest_gpus, plan_on_cpu, plan_on_gpus, plan_to_wait

GIB = 1024**3


def size(weights: float, room: float = 2, replicated: float = 0, heads: tuple[int, ...] = (8, 64)) -> ReplicaSize:
    """In GiB."""
    return ReplicaSize(
        weights_bytes=int(weights * GIB),
        replicated_bytes=int(replicated * GIB),
        room_bytes=int(room * GIB),
        heads=heads,
    )


def gpus(*total: float, free: float | None = None) -> list[Gpu]:
    """GPUs of so many GiB; one of 0 cannot be read."""
    return [
        Gpu(
            uuid=f"GPU-{n}",
            index=str(n),
            name="fake",
            total_bytes=int(each * GIB),
            free_bytes=int((each if free is None else free) * GIB),
            visible_device=str(n),
            problem=None if each else "lost",
        )
        for n, each in enumerate(total)
    ]


def plan(needed: ReplicaSize | None, box: list[Gpu], cap: int = 1, max_gpus: int | None = None) -> ReplicaPlan:
    return plan_on_gpus(needed, box, cap=cap, max_gpus=max_gpus, free_fraction=0.9, field="model_args.pretrained")


@pytest.mark.parametrize(
    ("needed", "usable", "expected"),
    [
        (size(14), [72] * 8, 1),
        (size(70), [72] * 8, 1),  # to the last byte
        (size(70.1), [72] * 8, 2),
        (size(200), [72] * 8, 4),  # 3 would hold it, but 3 does not divide 64 heads
        (size(200), [72] * 3, 3),  # then its layers are spread
        (size(200, heads=()), [72] * 8, 3),
        (size(600), [72] * 8, None),
        (size(30, replicated=22), [24, 24], None),  # what is not divided counts on each
        (size(30, replicated=14), [24, 24], 2),
        (size(60), [21.6, 72], 1),  # the larger one
        (size(100), [21.6, 72, 72], 2),
        (size(160), [21.6, 72, 72], None),  # three are needed, and one is too small for its third
    ],
)
def test_the_fewest_that_hold_it(needed: ReplicaSize, usable: list[float], expected: int | None) -> None:
    assert fewest_gpus(needed, [int(each * GIB) for each in usable]) == expected


SIZES = st.builds(
    lambda divided, replicated, room, heads: ReplicaSize(
        weights_bytes=divided + replicated, replicated_bytes=replicated, room_bytes=room, heads=tuple(heads)
    ),
    *[st.integers(0, 300)] * 3,
    st.lists(st.integers(1, 64), max_size=2),
)


@given(needed=SIZES, usable=st.lists(st.integers(1, 100), max_size=9))
def test_what_is_planned_fits_and_what_fits_is_planned(needed: ReplicaSize, usable: list[int]) -> None:
    count = fewest_gpus(needed, usable)

    def fits(on: int) -> bool:
        return all(have >= needed.bytes_on_each(on) for have in sorted(usable, reverse=True)[:on])

    if count is None:
        assert not any(fits(each) for each in range(1, len(usable) + 1))
    else:
        assert fits(count)
        assert count <= len(usable)
        assert not any(fits(each) and (each == 1 or needed.divides_by(each)) for each in range(1, count))
        total = needed.weights_bytes + needed.room_bytes
        assert count * needed.bytes_on_each(count) >= total, "a replica needs no less on several GPUs than on one"


@given(needed=SIZES, usable=st.lists(st.integers(1, 100), max_size=9), more=st.integers(1, 100))
def test_a_further_gpu_never_makes_it_not_fit(needed: ReplicaSize, usable: list[int], more: int) -> None:
    if fewest_gpus(needed, usable) is not None:
        assert fewest_gpus(needed, [*usable, more]) is not None


def test_the_plan() -> None:
    needed = size(130, replicated=2)
    assert plan(needed, gpus(80, 80), cap=2) == ReplicaPlan(gpus=2, memory_bytes=68 * GIB, size=needed)
    assert plan(None, gpus(80)) == ReplicaPlan(gpus=1, memory_bytes=0, size=None)


def test_what_others_use_at_the_moment_is_no_reason_to_refuse() -> None:
    assert plan(size(60), gpus(80, free=1)).gpus == 1


def test_a_gpu_that_cannot_be_read_may_come_back() -> None:
    assert plan(size(130), gpus(80, 0), cap=2).gpus == 2
    assert plan(size(130), gpus(0)).gpus == 1  # nothing is known: whether it fits will be seen


def test_more_than_num_gpus_is_refused_with_the_numbers() -> None:
    words = r"at least 2, but is 1: on each of 2 GPUs .* 72.5 GiB \(70.5 of weights and 2.0 of working room\)"
    with pytest.raises(InvalidRequest, match=words + ".* 8 GPUs of 74.7") as refused:
        plan(size(141), gpus(*[83] * 8))
    assert refused.value.field == "num_gpus"


@pytest.mark.parametrize("cap", [1, 2])
def test_more_than_may_be_held_is_refused_whatever_num_gpus_is(cap: int) -> None:
    """Raising `num_gpus` would not help. (A job that was admitted may find a smaller `max_gpus` after a restart.)"""
    assert plan(size(141), gpus(*[83] * 8), cap=2, max_gpus=2).gpus == 2
    words = r"on each of 2 GPUs the model needs 72.5 GiB .* no more than 1 may be held \(setting max_gpus\); .*bfloat16"
    with pytest.raises(InvalidRequest, match=words) as refused:
        plan(size(141), gpus(*[83] * 8), cap=cap, max_gpus=1)
    assert refused.value.field == "model_args.pretrained"
    with pytest.raises(InvalidRequest, match=r"no more than 0 may be held"):
        plan(None, gpus(80), max_gpus=0)


def test_more_than_all_is_refused_with_the_numbers() -> None:
    words = re.escape("needs 702.0 GiB (700.0 of weights and 2.0 of working room), and there is room on ")
    with pytest.raises(InvalidRequest, match=words + "2 GPUs of 72.0 GiB and 1 of 21.6 GiB; .*load_in_4bit") as refused:
        plan(size(700), gpus(24, 80, 80), cap=3)
    assert refused.value.field == "model_args.pretrained"


def test_a_cpu_has_the_memory_of_the_machine() -> None:
    needed = size(14)
    assert plan_on_cpu(needed, 16 * GIB, field="model") == ReplicaPlan(size=needed)
    assert plan_on_cpu(None, 1, field="model") == ReplicaPlan()
    with pytest.raises(InvalidRequest, match=r"needs 16.0 GiB .* this machine has 8.0 GiB") as refused:
        plan_on_cpu(needed, 8 * GIB, field="model")
    assert refused.value.field == "model"


def test_mig_instances_hold_a_replica_each_but_never_one_together() -> None:
    whole = gpus(80, 80)
    instances = [msgspec.structs.replace(gpu, index=f"2:{n}") for n, gpu in enumerate(gpus(40, 40))]
    assert plan(size(30), instances).gpus == 1
    assert plan(size(90), [*instances, *whole], cap=4).gpus == 2
    with pytest.raises(InvalidRequest, match=r"2 GPUs of 36.0 GiB \(a model cannot be spread over MIG instances\)"):
        plan(size(60), instances, cap=2)


@pytest.mark.parametrize(
    ("needed", "there", "cap", "expected"),
    [
        (100, (80,), 2, 2),  # the other one is missing
        (100, (80,), 4, 2),  # two like the one that is there would do
        (40, (24,), 1, 1),  # the large one is missing
        (1000, (80, 80), 4, 4),
        (40, (), 1, 1),
    ],
)
def test_what_had_room_once_waits_for_as_many_as_it_may_need(
    needed: float, there: tuple[float, ...], cap: int, expected: int
) -> None:
    wanted = plan_to_wait(size(needed), gpus(*there), cap=cap, free_fraction=0.9)
    assert wanted == ReplicaPlan(gpus=expected, memory_bytes=size(needed).bytes_on_each(expected), size=size(needed))
