"""The server on a box with GPUs, which the fake NVML library shows; they can be looked at, not computed on."""

from __future__ import annotations

from pathlib import Path

import pytest
from evalpool_server import Serve
from fake_nvml import FakeNvml, gpu_line, gpu_uuid, mig_uuid
from service import Json, Service, write_tasks

from server.client import EvalError

PLAIN, DIVIDED = gpu_line(), gpu_line(mig=True)
MIG = ("mig 2 0 20480 0", "mig 2 1 40960 0")


def test_a_box_with_gpus(
    serve: Serve, tiny_model: Path, tmp_path: Path, fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
):
    fake_nvml.write(PLAIN, PLAIN, DIVIDED, *MIG, "proc 0 4321 2048")
    fake_nvml.install(monkeypatch)
    with Service(serve("--include-path", write_tasks(tmp_path / "tasks"), "--cpu-workers", 1)) as box:
        shown = {gpu["index"]: gpu for gpu in box.client.gpus()["gpus"]}
        uuids = {"0": gpu_uuid(0), "1": gpu_uuid(1), "2:0": mig_uuid(2, 0), "2:1": mig_uuid(2, 1)}
        assert {index: gpu["uuid"] for index, gpu in shown.items()} == uuids
        assert [index for index, gpu in shown.items() if gpu["free"]] == ["1", "2:0", "2:1"]
        assert shown["0"]["reason"] == "Other processes use it: 4321 (2.0 GiB)."

        refuses(box, tiny_model, "num_gpus", "at most 4", num_gpus=5, device="cuda")
        refuses(box, tiny_model, "num_gpus", "at most 4", num_gpus=5, device=None)
        refuses(box, tiny_model, "device", "cuda:2:1", device="cuda:9")

        waiting = box.submit(tiny_model, "quick_choice", limit=4, device="cuda:0")
        for device in ("cuda:1", "cuda", None):
            assert_no_cuda(box.ended(box.submit(tiny_model, "quick_choice", limit=4, device=device)))
        assert box.job(waiting)["status"] == "queued"
        fake_nvml.write(PLAIN, PLAIN, DIVIDED, *MIG)  # the other process has ended
        assert_no_cuda(box.ended(waiting))
        assert box.finished(box.submit(tiny_model, "quick_choice", limit=4))["model"]["device"] == "cpu"
        assert {gpu["worker_id"] for gpu in box.client.gpus()["gpus"]} == {None}


def refuses(box: Service, model: Path, field: str, reason: str, **options: object) -> None:
    """Assert that such a job is refused for that field."""
    with pytest.raises(EvalError) as refused:
        box.submit(model, "quick_choice", **options)
    assert refused.value.response.status_code == 422
    assert [problem["field"] for problem in refused.value.fields] == [field]
    assert reason in refused.value.fields[0]["problem"]


def assert_no_cuda(job: Json) -> None:
    """Assert that the job failed because PyTorch cannot use the GPU."""
    assert job["status"] == "failed"
    assert "cuda" in job["error"].lower()
