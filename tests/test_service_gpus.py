"""The server on boxes with GPUs, which the fake NVML library shows; its workers are shown on them and need none."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from fake_nvml import FakeNvml, gpu_line, gpu_uuid, mig_uuid
from gpu_box import STRANGER, GpuBox, gpu_box, with_weights
from gpu_worker import USED_MIB
from service import until

from server.client import EvalError

PLAIN, DIVIDED = gpu_line(used_mib=512), gpu_line(mig=True)
BOX = (PLAIN,) * 6
UUIDS = [gpu_uuid(n) for n in range(6)]
STRANGERS = tuple(f"proc {n} {STRANGER + n} 2048" for n in range(6))


@pytest.fixture(scope="module")
def nvml(fake_nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> FakeNvml:
    nvml = FakeNvml(fake_nvml_library, tmp_path_factory.mktemp("nvml"))
    nvml.write(*BOX)
    return nvml


@pytest.fixture(scope="module")
def box(nvml: FakeNvml, tmp_path_factory: pytest.TempPathFactory) -> Generator[GpuBox]:
    """Six GPUs of 80 GiB."""
    settings = ("yield_to_foreign = true", "gpu_return_timeout_s = 1")
    with gpu_box(tmp_path_factory.mktemp("box"), nvml, *settings) as box:
        yield box


@pytest.fixture(autouse=True)
def _every_gpu_is_free_again(box: GpuBox, nvml: FakeNvml) -> Generator[None]:
    yield
    nvml.write(*BOX, *STRANGERS)
    until(lambda: not box.gpu_workers() and not box.client.gpus()["held"], "idle workers have made way for strangers")
    nvml.write(*BOX)


def test_what_there_is_and_what_is_refused(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    nvml.write(*BOX, DIVIDED, "mig 6 0 20480 0", "mig 6 1 40960 0")
    shown = box.client.gpus()["gpus"]
    uuids = {str(n): UUIDS[n] for n in range(6)} | {"6:0": mig_uuid(6, 0), "6:1": mig_uuid(6, 1)}
    assert {gpu["index"]: gpu["uuid"] for gpu in shown} == uuids
    field, problem = box.refused(tiny_model, num_gpus=9)
    assert (field, "at most 8" in problem) == ("num_gpus", True)
    field, problem = box.refused(tiny_model, None, num_gpus=9)
    assert (field, "at most 8" in problem) == ("num_gpus", True)
    field, problem = box.refused(tiny_model, "cuda:9")
    assert (field, problem.endswith(f", {mig_uuid(6, 1)} (of GPU 6)")) == ("device", True)
    field, problem = box.refused(tiny_model, gpu_uuid(9))
    assert field == "device"
    assert problem.startswith(f"there is no GPU {gpu_uuid(9)}; this box has {UUIDS[0]} (cuda:0), ")
    assert box.finished(box.job_on(tiny_model, "cpu"))["model"]["device"] == "cpu"
    assert box.finished(box.job_on(tiny_model, None))["model"]["device"] == "cuda"


def test_a_job_waits_while_strangers_are_everywhere(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    nvml.write(*BOX, *STRANGERS)
    job = box.job_on(tiny_model)
    reason = box.waits(job, "0 of the 6 GPUs")
    assert f"GPU 3: Other processes use it: {STRANGER + 3} (2.0 GiB)" in reason
    assert f"GPU 5: Other processes use it: {STRANGER + 5} (2.0 GiB)" in reason
    assert not any(gpu["free"] for gpu in box.client.gpus()["gpus"])
    with nvml.holding():
        nvml.write(*BOX, *STRANGERS[:3], *STRANGERS[4:])
        assert box.worker_of(job)["slots"] == [UUIDS[3]]
    box.finished(job)


def test_a_stranger_beside_a_worker_is_told_of_and_an_idle_worker_yields(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    with nvml.holding():
        job = box.job_on(tiny_model, "cuda:0")
        worker = box.worker_of(job)
        nvml.write(*BOX, f"proc 0 {STRANGER} 2048")
        sentence = f"GPU 0 ({UUIDS[0]}) is also used by other processes: {STRANGER} (2.0 GiB)"
        until(lambda: sentence in box.client.log(job), "the job's log tells of the stranger")
        assert f"{sentence} (beside {worker['worker_id']})" in box.log()
        gpu = box.gpu(0)
        assert gpu["foreign_processes"] == [{"pid": STRANGER, "used_bytes": 2 << 30}]
        assert (gpu["worker_ids"], gpu["free"]) == ([worker["worker_id"]], False)
        assert gpu["reason"] == f"Other processes use it: {STRANGER} (2.0 GiB)."
        assert box.worker_of(job) == worker
    box.finished(job)
    box.gpu_once(0, worker_ids=[], reason=f"Other processes use it: {STRANGER} (2.0 GiB).")
    nvml.write(*BOX)
    box.gpu_once(0, free=True, reason=None)


def test_a_stranger_that_is_not_listed_shows_by_its_memory(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    hidden = ("error nvmlDeviceGetComputeRunningProcesses_v3 4",)
    nvml.write(*BOX, *hidden)
    box.finished(box.job_on(tiny_model, "cuda:0"))
    [worker_id] = box.gpu(0)["worker_ids"]
    assert box.gpu(0)["reason"] is None
    nvml.write(gpu_line(used_mib=30 * 1024), *BOX[1:], *hidden)
    sentence = f"GPU 0 ({UUIDS[0]}) is also used by other processes: unlisted (29.5 GiB) (beside {worker_id})"
    until(lambda: sentence in box.log(), "the log tells of the stranger")
    box.gpu_once(0, worker_ids=[], quarantined=False, reason="Only 50.0 of 80.0 GiB are free; 90% must be.")


def test_memory_that_does_not_come_back_is_quarantined_until_it_is_released(
    box: GpuBox, nvml: FakeNvml, tiny_model: Path
):
    with nvml.holding():
        first = box.job_on(tiny_model, "cuda:1")
        worker = box.worker_of(first)
        nvml.write(*BOX, f"keep {worker['pid']}")
        os.kill(worker["pid"], signal.SIGKILL)
        why = (
            f"It is quarantined: 1 s after a worker ended, processes of {worker['worker_id']} are still on it: "
            f"{worker['pid']} ({USED_MIB / 1024:.1f} GiB)."
        )
        gpu = box.gpu_once(1, quarantined=True)
        assert (gpu["reason"], gpu["free"], gpu["worker_ids"]) == (why, False, [])
    second = box.job_on(tiny_model, "cuda:1")
    for job, cause in ((first, "It has no workers now. "), (second, "")):
        box.waits(job, f"{cause}The only GPU that would do is not free. Not usable: GPU 1: {why}")
    nvml.write(*BOX)
    assert box.gpu(1)["quarantined"]  # also when nothing is wrong any more
    assert box.client.release_gpu(UUIDS[1])["reason"] is None
    box.finished(first)
    box.finished(second)
    for uuid, status, words in ((UUIDS[1], 409, "is not quarantined"), ("GPU-9", 404, UUIDS[1])):
        with pytest.raises(EvalError, match=words) as refused:
            box.client.release_gpu(uuid)
        assert refused.value.response.status_code == status


def test_a_job_goes_on_elsewhere_when_its_gpu_is_lost(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    with nvml.holding():
        job = box.job_on(tiny_model)
        number = UUIDS.index(box.worker_of(job)["slots"][0])
        nvml.write(*BOX, f"error * 15 {number}")
        await_move(box, job, away_from=UUIDS[number])
        gpu = box.gpu_once(number, lost=True, worker_ids=[])
        assert (gpu["free"], gpu["quarantined"]) == (False, False)
        assert "GPU is lost (NVML error 15)" in gpu["reason"]
    assert box.finished(job)["attempt"] == 1
    nvml.write(*BOX)
    box.gpu_once(number, lost=False, free=True)


def test_a_job_that_has_no_other_gpu_waits_until_its_own_is_back(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    with nvml.holding():
        job = box.job_on(tiny_model, "cuda:4")
        box.worker_of(job)
        nvml.write(*BOX, "error * 16 4")
        box.waits(job, "It has no workers now. The only GPU that would do is not free.", "NVML error 16")
        nvml.write(*BOX)
        box.worker_of(job)
    assert box.finished(job)["attempt"] == 1


def test_a_job_goes_on_elsewhere_when_its_gpu_is_divided(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    with nvml.holding():
        job = box.job_on(tiny_model)
        number = UUIDS.index(box.worker_of(job)["slots"][0])
        nvml.write(*BOX[:number], DIVIDED, *BOX[number + 1 :], f"mig {number} 0 20480 0")
        await_move(box, job, away_from=UUIDS[number])
        assert UUIDS[number] not in {gpu["uuid"] for gpu in box.client.gpus()["gpus"]}
        assert box.gpu(f"{number}:0")["uuid"] == mig_uuid(number, 0)
    assert box.finished(job)["attempt"] == 1


def test_a_driver_that_hangs_stops_nobody(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    begun = box.job_on(tiny_model, variant=1)  # a worker is meant for it, and refused at the last moment
    nvml.write(*BOX, "hang nvmlDeviceGetMemoryInfo 5")
    job = box.job_on(tiny_model)
    box.waits(job, "GPU 0: NVML has not answered for 5 s")
    assert box.client.health()["trouble"] == "NVML has not answered for 5 s."
    assert box.finished(box.job_on(tiny_model, "cpu"))
    nvml.write(*BOX)
    box.finished(begun)
    box.finished(job)


def test_a_driver_that_goes_and_comes_back(box: GpuBox, nvml: FakeNvml, tiny_model: Path):
    with nvml.holding():
        running = box.job_on(tiny_model)
        worker = box.worker_of(running)
        nvml.write(*BOX, "error * 9")
        waiting = box.job_on(tiny_model, variant=1)
        box.waits(waiting, "Driver Not Loaded (NVML error 9)")
        assert "Driver Not Loaded (NVML error 9)" in box.client.gpus()["problem"]
        assert "Driver Not Loaded (NVML error 9)" in box.client.health()["trouble"]
        assert box.worker_of(running) == worker
    box.finished(running)
    nvml.write(*BOX)
    box.finished(waiting)
    assert box.client.gpus()["problem"] is None
    assert box.client.health()["status"] == "healthy"


def test_a_model_that_needs_two_gpus(box: GpuBox, nvml: FakeNvml, tiny_model: Path, tmp_path: Path):
    large = with_weights(tiny_model, tmp_path / "large", gib=100)
    field, problem = box.refused(large, num_gpus=1)
    assert field == "num_gpus"
    assert "must be at least 2, but is 1: on each of 2 GPUs the model needs 51." in problem
    assert "there is room on 6 GPUs of 72.0 GiB" in problem
    with nvml.holding():
        job = box.job_on(large, num_gpus=2)
        worker = box.worker_of(job)
        numbers = [UUIDS.index(uuid) for uuid in worker["slots"]]
        assert worker["description"] == f"CUDA_VISIBLE_DEVICES={numbers[0]},{numbers[1]}"
        assert [box.gpu(n)["worker_ids"] for n in numbers] == [[worker["worker_id"]]] * 2
    box.finished(job)
    field, problem = box.refused(with_weights(tiny_model, tmp_path / "vast", gib=1000), num_gpus=6)
    assert field == "model_args.pretrained"
    assert "the model needs 1001." in problem
    assert "there is room on 6 GPUs of 72.0 GiB" in problem


def test_two_workers_share_a_gpu(fake_nvml: FakeNvml, tiny_model: Path, tmp_path: Path):
    fake_nvml.write(PLAIN)
    large = with_weights(tiny_model, tmp_path / "large", gib=60)
    with gpu_box(tmp_path / "box", fake_nvml, "max_workers_per_gpu = 2") as box:
        box.finished(box.job_on(tiny_model))
        [first] = box.gpu(0)["worker_ids"]
        with fake_nvml.holding():
            job = box.job_on(tiny_model, variant=1)
            second = box.worker_of(job)["worker_id"]
            assert box.gpu(0)["worker_ids"] == [first, second]
            waiting = box.job_on(large)
            os.kill(box.worker_pids()[first], signal.SIGKILL)
            box.gpu_once(0, worker_ids=[second], reason=None, quarantined=False)
            box.waits(waiting, f"Held: GPU 0 by {second} (job {job}")
        box.finished(waiting)  # once the idle worker has made room


def test_two_servers_share_the_box(box: GpuBox, nvml: FakeNvml, tiny_model: Path, tmp_path: Path):
    lists = ('allow_gpus = ["0,1,2"]', 'deny_gpus = ["1"]', "max_gpus = 1")
    times = ("idle_worker_s = 0.5", "drop_timeout_s = 0.5", "gpu_return_timeout_s = 600")
    with gpu_box(tmp_path / "other", nvml, *lists, *times) as other:
        assert_only_what_is_allowed_is_used(other, nvml, tiny_model)
        held = f"Another evalpool server on this machine (process {other.server.process.pid}) holds it."
        with nvml.holding():
            job = other.job_on(tiny_model, "cuda:0")
            other.worker_of(job)
            waiting = box.job_on(tiny_model, "cuda:0")
            box.waits(waiting, f"Not usable: GPU 0: {held}")
            assert box.gpu(0)["reason"] == held
        other.finished(job)
        box.finished(waiting)  # once the other has dropped its idle worker
        pid = leave_memory_behind(other, nvml, tiny_model, gpu=2)
        waiting = box.job_on(tiny_model, "cuda:2", variant=1)
        box.waits(waiting, f"Not usable: GPU 2: {held}")
        other.server.stop()
        box.waits(waiting, f"Not usable: GPU 2: Other processes use it: {pid} (20.0 GiB)")
        nvml.write(*BOX)
        box.finished(waiting)


def assert_only_what_is_allowed_is_used(box: GpuBox, nvml: FakeNvml, model: Path) -> None:
    shown = box.client.gpus()
    assert ([gpu["index"] for gpu in shown["gpus"]], shown["max_gpus"], shown["problem"]) == (["0", "2"], 1, None)
    assert box.refused(model, num_gpus=2) == ("num_gpus", "must be at most 1: no more GPUs are held (setting max_gpus)")
    assert box.refused(model, "cuda:1")[0] == "device"
    with nvml.holding():
        first = box.job_on(model, "cuda:0")
        box.worker_of(first)
        second = box.job_on(model, "cuda:2")
        box.waits(second, "No more than 1 GPU may be held (setting max_gpus): GPU 0 by ")
        assert box.client.gpus()["held"] == 1
    box.finished(first)
    box.finished(second)


def leave_memory_behind(box: GpuBox, nvml: FakeNvml, model: Path, gpu: int) -> int:
    """Cancel a job whose worker hangs, on a GPU that keeps its memory; returns the pid that NVML goes on showing."""
    with nvml.holding():
        job = box.job_on(model, f"cuda:{gpu}")
        worker = box.worker_of(job)
        nvml.write(*BOX, f"keep {worker['pid']}")
        os.kill(worker["pid"], signal.SIGSTOP)
        box.client.cancel_job(job)
        assert box.ended(job)["status"] == "cancelled"
    reason = f"{worker['worker_id']} has ended; its memory is not back yet."
    assert not box.gpu_once(gpu, reason=reason, worker_ids=[worker["worker_id"]])["free"]
    waiting = box.job_on(model, f"cuda:{gpu}")
    box.waits(waiting, f"GPU {gpu} by {worker['worker_id']} (gone, its memory is not back yet)")
    return worker["pid"]


def await_move(box: GpuBox, job_id: str, away_from: str) -> None:
    """Until the job has a worker, and that on another GPU."""

    def look() -> bool:
        slots = [slot for worker in box.workers_of(job_id) for slot in worker["slots"]]
        return bool(slots) and away_from not in slots

    until(look, f"job {job_id} goes on elsewhere")
