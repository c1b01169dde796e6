"""The server on a box that others use too, and whose driver has bad days: nothing is lost, and the reason is told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from fake_nvml import FakeNvml, gpu_line, gpu_uuid
from gpu_box import STRANGER, gpu_box, with_weights
from gpu_worker import USED_MIB

PLAIN = gpu_line(used_mib=512)


def test_a_large_model_waits_for_gpus_that_strangers_fill(fake_nvml: FakeNvml, tiny_model: Path, tmp_path: Path):
    filled = [f"proc {n} {STRANGER + n} {70 * 1024}" for n in range(2)]
    fake_nvml.write(PLAIN, PLAIN, *filled)
    large = with_weights(tiny_model, tmp_path / "large", gib=40)
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        job = box.job_on(large)
        reason = box.waits(job, "0 of the 2 GPUs that would do are free.")
        for n in range(2):
            assert f"GPU {n}: Other processes use it: {STRANGER + n} (70.0 GiB)" in reason
        with fake_nvml.holding():
            fake_nvml.write(PLAIN, PLAIN, filled[0])
            worker = box.worker_of(job)
            assert box.gpu(1)["worker_ids"] == [worker["worker_id"]]
        box.finished(job)


def test_a_restart_while_the_driver_hangs_or_is_away_loses_no_job(
    fake_nvml: FakeNvml, tiny_model: Path, tmp_path: Path
):
    fake_nvml.write(PLAIN, f"proc 0 {STRANGER} 2048")
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        jobs = [box.job_on(tiny_model, device) for device in ("cuda", None)]
        for job in jobs:
            box.waits(job, "Other processes use it")
    fake_nvml.write(PLAIN, "hang nvmlDeviceGetMemoryInfo 0")
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        for reason in ("NVML has not answered for 5 s", "No GPU can be used: Driver Not Loaded (NVML error 9)"):
            for job in jobs:
                box.waits(job, f"GPU 0: {reason}")
            assert box.client.gpus()["problem"] == f"{reason}."
            fake_nvml.write(PLAIN, "error * 9")
        box.finished(box.job_on(tiny_model, "cpu"))
        fake_nvml.write(PLAIN)
        for job in jobs:
            assert box.finished(job)["model"]["device"] == "cuda"


def test_at_the_first_start_without_the_driver_jobs_wait_for_it(fake_nvml: FakeNvml, tiny_model: Path, tmp_path: Path):
    fake_nvml.write(PLAIN, "error * 9")
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        jobs = [box.job_on(tiny_model, device) for device in (None, "cuda", "cuda:0")]
        for job in jobs:
            box.waits(job, "No GPU can be used: Driver Not Loaded (NVML error 9).", "device 'cpu'", "max_gpus = 0")
        assert "Jobs wait for the driver unless they are for the CPU." in box.log()
        assert box.finished(box.job_on(tiny_model, "cpu"))["model"]["device"] == "cpu"
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        for job in jobs:
            box.waits(job, "Driver Not Loaded")
        fake_nvml.write(PLAIN)
        for job in jobs:
            assert box.finished(job)["model"]["device"] == "cuda"


def test_a_restart_while_gpus_are_gone_loses_no_job(fake_nvml: FakeNvml, tiny_model: Path, tmp_path: Path):
    strangers = [f"proc {n} {STRANGER + n} 2048" for n in range(2)]
    fake_nvml.write(PLAIN, PLAIN, *strangers)
    large = with_weights(tiny_model, tmp_path / "large", gib=100)
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        jobs = [box.job_on(tiny_model, device) for device in ("cuda:1", gpu_uuid(1))]
        jobs.append(box.job_on(large, num_gpus=2))
        for job in jobs:
            box.waits(job, "Other processes use it")
    fake_nvml.write(PLAIN, strangers[0])
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        for job in jobs:
            box.waits(job, "No GPU that would do is there." if job != jobs[-1] else "The only GPU that would do")
        fake_nvml.write(PLAIN, PLAIN)
        for job in jobs:
            box.finished(job)
    fake_nvml.write(PLAIN, *strangers[:1])
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        job = box.job_on(tiny_model)
        box.waits(job, "Other processes use it")
    fake_nvml.write()
    with gpu_box(tmp_path / "box", fake_nvml) as box:
        box.waits(job, "No GPU that would do is there.")
        fake_nvml.write(PLAIN)
        box.finished(job)


def test_a_container_that_shows_the_host_s_process_ids(
    fake_nvml: FakeNvml, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FAKE_CONTAINER", "yes")
    box_lines = (PLAIN, f"host {2**22}")
    fake_nvml.write(*box_lines)
    with gpu_box(tmp_path / "box", fake_nvml, "yield_to_foreign = true", "gpu_return_timeout_s = 1") as box:
        with fake_nvml.holding():
            job = box.job_on(tiny_model)
            worker = box.worker_of(job)
            assert box.gpu_once(0, free_bytes=(81920 - USED_MIB - 512) << 20)["foreign_processes"] == []
            fake_nvml.write(*box_lines, f"keep {worker['pid']}")
            os.kill(worker["pid"], signal.SIGKILL)
            gpu = box.gpu_once(0, quarantined=True)
            assert f"{worker['worker_id']} are still on it: {worker['pid'] + 2**22} (20.0 GiB)" in gpu["reason"]
        fake_nvml.write(*box_lines)
        box.client.release_gpu(gpu["uuid"])
        box.finished(job)
        assert box.gpu(0)["worker_ids"]
        fake_nvml.write(*box_lines, f"proc 0 {STRANGER} 2048")
        box.gpu_once(0, worker_ids=[], quarantined=False, reason=f"Other processes use it: {STRANGER} (2.0 GiB).")
