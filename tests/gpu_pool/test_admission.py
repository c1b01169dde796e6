"""What this box refuses: devices it does not have, more of them than there are, folders outside the roots."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from pathlib import Path
from typing import Any, cast

import msgspec
import pynvml
import pytest
from fake_nvml import FakeNvml, gpu_line, gpu_uuid, mig_uuid

from gpu_pool.admission import Admission, Placement
from gpu_pool.desk import Desk, DeskUnavailable
from gpu_pool.endpoints import Endpoint
from gpu_pool.errors import InvalidRequest
from gpu_pool.gpus import Inventory
from gpu_pool.hardware import Gpu
from gpu_pool.leases import Leases
from gpu_pool.messages import TaskProblem
from gpu_pool.model_size import ReplicaSize
from gpu_pool.records import Evaluation, Modality
from gpu_pool.replica_plan import ReplicaPlan
from gpu_pool.settings import PoolSettings
from server.requests import EvaluateRequest


class Gpus(Inventory):
    """That many free GPUs."""

    def __init__(self, count: int) -> None:
        super().__init__(visible_devices="")
        self.count = count
        self.reason = None if count else "No GPU can be used: the driver is away."

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(
            Gpu(uuid=f"GPU-{n}", index=str(n), name="fake", total_bytes=1, free_bytes=1, visible_device=str(n))
            for n in range(self.count)
        )


class OneTask:
    """A desk that knows one task."""

    async def check(
        self, tasks: tuple[str, ...], num_fewshot: int | None, modalities: Set[Modality], **_: object
    ) -> tuple[TaskProblem, ...]:
        unknown = (task for task in tasks if task != "arc_easy")
        return tuple(TaskProblem(task=task, reason="unknown task", suggestions=("arc_easy",)) for task in unknown)


async def box(folder: Path, gpus: int = 0, **settings: Any) -> Admission:
    roots = (folder / "allowed",)
    chosen = PoolSettings(**{"data_dir": folder / "data", "cpu_workers": 2, "output_roots": roots} | settings)
    leases = Leases(chosen, Gpus(gpus))
    await leases.look()
    return Admission(chosen, cast(Desk, OneTask()), leases)


def evaluation(**fields: object) -> Evaluation:
    return msgspec.structs.replace(Evaluation(model="hf", tasks=("arc_easy",)), **fields)


@pytest.mark.parametrize(
    ("gpus", "fields", "expected"),
    [
        (1, {"num_gpus": 4}, Placement(device="cuda", max_replicas=4)),
        (1, {"device": "cuda:1"}, Placement(device="cuda", max_replicas=1, slot_index="1")),
        (1, {"device": "GPU-1"}, Placement(device="cuda", max_replicas=1, slot_id="GPU-1")),
        (0, {"device": "cuda"}, Placement(device="cuda", max_replicas=1)),
    ],
)
async def test_a_job_from_before_waits_for_what_is_not_there(
    tmp_path: Path, gpus: int, fields: dict[str, object], expected: Placement
) -> None:
    admission = await box(tmp_path, gpus)
    with pytest.raises(InvalidRequest):
        admission.place(evaluation(**fields))
    assert admission.place(evaluation(**fields), is_admitted=True) == expected


async def test_a_job_from_before_whose_model_is_too_large_for_what_is_left_waits(tmp_path: Path) -> None:
    admission = await box(tmp_path, 1)  # GPUs of one byte
    large, place = ReplicaSize(weights_bytes=10, room_bytes=1), Placement(device="cuda", max_replicas=2)
    with pytest.raises(InvalidRequest):
        admission.plan(evaluation(num_gpus=2), large, place)
    plan = admission.plan(evaluation(num_gpus=2), large, place, is_admitted=True)
    assert plan == ReplicaPlan(gpus=2, memory_bytes=large.bytes_on_each(2), size=large)


@pytest.mark.parametrize(
    ("gpus", "fields", "expected"),
    [
        (0, {}, Placement(device="cpu", max_replicas=1)),
        (0, {"num_gpus": 2}, Placement(device="cpu", max_replicas=2)),
        (0, {"num_gpus": 0}, Placement(device="cpu", max_replicas=1)),
        (2, {}, Placement(device="cuda", max_replicas=1)),
        (2, {"num_gpus": 0}, Placement(device="cpu", max_replicas=1)),
        (2, {"device": "cpu"}, Placement(device="cpu", max_replicas=1)),
        (2, {"device": "cuda", "num_gpus": 2}, Placement(device="cuda", max_replicas=2)),
        (2, {"device": "cuda:1"}, Placement(device="cuda", max_replicas=1, slot_index="1")),
        (2, {"device": "GPU-1"}, Placement(device="cuda", max_replicas=1, slot_id="GPU-1")),
    ],
)
async def test_where_a_job_may_run(tmp_path: Path, gpus: int, fields: dict[str, object], expected: Placement) -> None:
    assert (await box(tmp_path, gpus)).place(evaluation(**fields)) == expected


@pytest.mark.parametrize("device", ["cuda:0", "cuda:9", gpu_uuid(9)])
async def test_what_is_said_to_be_there_can_be_asked_for(
    tmp_path: Path, fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    fake_nvml.install_here(monkeypatch)
    fake_nvml.write(gpu_line(mig=True), gpu_line(), "mig 0 0 20480 0", "mig 0 1 40960 0")
    settings = PoolSettings(data_dir=tmp_path)
    leases = Leases(settings, Inventory.open({}))
    await leases.look()
    admission = Admission(settings, cast(Desk, OneTask()), leases)
    with pytest.raises(InvalidRequest) as refused:
        admission.place(evaluation(device=device))
    what, _, there = refused.value.problem.partition("; this box has ")
    names = [name.partition(" ")[0] for name in there.split(", ")]
    assert names == [mig_uuid(0, 0), mig_uuid(0, 1), gpu_uuid(1) if device == gpu_uuid(9) else "cuda:1"]
    assert ("divided into MIG instances" in what) == (device == "cuda:0")
    for name in names:
        request = {"model": "hf", "model_args": {"pretrained": "/m"}, "tasks": ["arc_easy"], "device": name}
        assert admission.place(evaluation(device=msgspec.convert(request, EvaluateRequest).device)).device == "cuda"


async def test_jobs_wait_for_a_driver_that_has_never_answered(
    tmp_path: Path, fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvml.install_here(monkeypatch)
    fake_nvml.write(gpu_line(), "error * 9")
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=2, max_gpus=4)
    leases = Leases(settings, Inventory.open({}))
    admission = Admission(settings, cast(Desk, OneTask()), leases)
    wanted = [evaluation(), evaluation(num_gpus=2), evaluation(device="cuda:0")]
    assert [admission.place(each).device for each in wanted] == ["cuda"] * 3
    assert all(map(admission.awaits_driver, wanted))
    for on_cpu in (evaluation(device="cpu"), evaluation(num_gpus=0)):
        assert not admission.awaits_driver(on_cpu)
        assert admission.place(on_cpu).device == "cpu"
    with pytest.raises(InvalidRequest, match="max_gpus"):
        admission.place(evaluation(num_gpus=5))
    await leases.look()
    assert "Driver Not Loaded" in admission.no_driver
    answers = asyncio.ensure_future(admission.driver_answers())
    await asyncio.sleep(0)
    assert not answers.done()
    fake_nvml.write(gpu_line())
    await leases.look()
    await answers
    assert admission.place(evaluation()) == Placement(device="cuda", max_replicas=1)
    assert not admission.awaits_driver(evaluation())


@pytest.mark.parametrize(
    ("line", "environment", "settings"),
    [
        (f"error nvmlInitWithFlags {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}", {}, {}),
        ("error * 9", {"CUDA_VISIBLE_DEVICES": ""}, {}),
        ("error * 9", {"CUDA_VISIBLE_DEVICES": "-1"}, {}),
        ("error * 9", {}, {"max_gpus": 0}),
        ("", {}, {}),
    ],
)
async def test_where_no_gpu_can_be_meant_jobs_run_on_the_cpu(
    tmp_path: Path,
    fake_nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    environment: dict[str, str],
    settings: dict[str, int],
) -> None:
    fake_nvml.install_here(monkeypatch)
    fake_nvml.write(line)
    chosen = PoolSettings(data_dir=tmp_path, cpu_workers=1, **settings)
    admission = Admission(chosen, cast(Desk, OneTask()), Leases(chosen, Inventory.open(environment)))
    assert not admission.awaits_driver(evaluation())
    assert admission.place(evaluation()).device == "cpu"


async def test_a_server_that_may_hold_no_gpu_uses_its_cpu(tmp_path: Path) -> None:
    admission = await box(tmp_path, 2, max_gpus=0)
    assert admission.place(evaluation()) == Placement(device="cpu", max_replicas=1)
    with pytest.raises(InvalidRequest, match="max_gpus"):
        admission.place(evaluation(device="cuda"))


@pytest.mark.parametrize(
    ("gpus", "fields", "field", "words"),
    [
        (0, {"device": "cuda"}, "device", "no GPU: the driver is away; use 'cpu'"),
        (0, {"num_gpus": 3}, "num_gpus", "at most 2.*2 CPU workers"),
        (2, {"num_gpus": 3}, "num_gpus", "at most 2.*2 GPUs"),
        (2, {"device": "cuda:7"}, "device", "cuda:0, cuda:1"),
        (2, {"device": "cuda:0", "num_gpus": 2}, "num_gpus", "one GPU"),
        (2, {"device": "cuda", "num_gpus": 0}, "num_gpus", "at least 1"),
    ],
)
async def test_what_the_box_does_not_have(
    tmp_path: Path, gpus: int, fields: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        (await box(tmp_path, gpus)).place(evaluation(**fields))
    assert refused.value.field == field


async def test_output_goes_only_under_the_roots(tmp_path: Path) -> None:
    admission = await box(tmp_path)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "way-out").symlink_to(tmp_path)
    (tmp_path / "allowed" / "file").touch()
    assert admission.check_output_dir(None) is None
    assert admission.check_output_dir(f"{tmp_path}/allowed/run") == tmp_path / "allowed" / "run"
    assert admission.check_output_dir(f"{tmp_path}/data/run") == tmp_path / "data" / "run"
    for outside in ("/etc", "allowed/../..", "allowed/way-out/elsewhere", "allowed/../allowed-not", "\0"):
        with pytest.raises(InvalidRequest) as refused:
            admission.check_output_dir(f"{tmp_path}/{outside}" if outside != "/etc" else outside)
        assert refused.value.field == "output_dir"
    with pytest.raises(InvalidRequest, match="is a file"):
        admission.check_output_dir(f"{tmp_path}/allowed/file")


async def test_a_refused_task_is_named_with_the_nearest(tmp_path: Path, tiny_model: Path) -> None:
    admission = await box(tmp_path)
    wrong = evaluation(model=str(tiny_model), tasks=("arc_easy", "ark"))
    with pytest.raises(InvalidRequest, match="unknown task") as refused:
        await admission.admit(wrong)
    assert (refused.value.field, refused.value.choices) == ("tasks[1]", ("arc_easy",))
    right = evaluation(model=str(tiny_model))
    await admission.admit(right)
    args = await admission.model_args(right)
    assert args.pretrained == str(tiny_model)


class Mortal(OneTask):
    """It ends as often as that while it is asked, and then knows its task."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths

    async def check(self, *asked: Any, **more: Any) -> tuple[TaskProblem, ...]:
        self.deaths -= 1
        if self.deaths >= 0:
            raise DeskUnavailable
        return await super().check(*asked, **more)


async def test_a_desk_that_ends_meanwhile_is_asked_once_more(tiny_model: Path, tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=2)
    leases = Leases(settings, Inventory(visible_devices=""))
    fine, unknown = (evaluation(model=str(tiny_model), tasks=(task,)) for task in ("arc_easy", "arc_eazy"))
    await Admission(settings, cast(Desk, Mortal(1)), leases).admit(fine)
    with pytest.raises(InvalidRequest, match="unknown task"):
        await Admission(settings, cast(Desk, Mortal(1)), leases).admit(unknown)
    with pytest.raises(DeskUnavailable):
        await Admission(settings, cast(Desk, Mortal(2)), leases).admit(fine)


TALK = Endpoint(base_url="https://host/v1", model="m")


@pytest.mark.parametrize("gpus", [0, 2])
async def test_a_model_behind_an_endpoint_needs_nothing_of_the_box(tmp_path: Path, gpus: int) -> None:
    admission = await box(tmp_path, gpus, endpoints={"talk": TALK})
    asked = evaluation(model="openai", num_gpus=0)
    await admission.admit(asked)
    place = admission.place(asked)
    assert place == Placement(device="api", max_replicas=1, slot_id="api:talk")
    assert admission.plan(asked, None, place) == ReplicaPlan()
    assert not admission.awaits_driver(asked)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"device": "cuda:0"}, "device"),
        ({"num_gpus": 2}, "num_gpus"),
        ({"deterministic": True}, "deterministic"),
        ({"merge": "ema"}, "merge"),
        ({"model": "local-completions"}, "model"),
    ],
)
async def test_what_an_endpoint_has_not(tmp_path: Path, fields: dict[str, object], field: str) -> None:
    admission = await box(tmp_path, 2, endpoints={"talk": TALK})
    with pytest.raises(InvalidRequest) as refused:
        await admission.admit(evaluation(**{"model": "openai"} | fields))
    assert refused.value.field == field
