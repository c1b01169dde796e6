"""A server on a box with GPUs of the fake NVML library, and short words for what tests do with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from evalpool_server import run_server
from fake_nvml import FakeNvml
from gpu_worker import COMPUTES
from service import Json, Service, until, write_tasks

from server.client import EvalError

PROGRAM = (Path(__file__).parents[1] / "fakes" / "gpu_server.py",)
STRANGER = 2**22 + 77  # no process here can have this number


class GpuBox(Service):
    """Jobs are small ones of one model, on any GPU unless they say otherwise."""

    def job_on(self, model: Path, device: str | None = "cuda", *, variant: int = 0, **options: Any) -> str:
        """The new job's id. Jobs of different variants cannot share a worker."""
        model_args = {"max_length": 2048 - variant}
        return self.submit(model, "quick_choice", model_args=model_args, device=device, **({"limit": 4} | options))

    def gpu(self, index: int | str) -> Json:
        """As GET /gpus shows it now."""
        return next(gpu for gpu in self.client.gpus()["gpus"] if gpu["index"] == str(index))

    def gpu_once(self, index: int | str, **facts: Any) -> Json:
        """The same once all these facts hold."""

        def look() -> Json | None:
            gpu = self.gpu(index)
            return gpu if facts.items() <= gpu.items() else None

        return until(look, f"GPU {index} is {facts}")

    def waits(self, job_id: str, *words: str) -> str:
        """Why the job waits, by GET /queue, once all these words are in it; fails when the job has ended."""

        def look() -> str | None:
            reason = {wait["job_id"]: wait["reason"] for wait in self.client.get_queue_status()["waiting"]}.get(job_id)
            if reason and all(word in reason for word in words):
                return reason
            job = self.job(job_id)
            assert job["completed_at"] is None, f"{job['status']} {job['error']}, after {reason}\n{self.log()}"
            return None

        return until(look, f"job {job_id} waits because of {words}")

    def gpu_workers(self) -> list[Json]:
        """Those that are on GPUs, there or not."""
        return [worker for worker in self.client.workers()["workers"] if worker["model"]["device"] == "cuda"]

    def worker_of(self, job_id: str) -> Json:
        """The one worker that computes for the job, once it does."""

        def look() -> list[Json]:
            return [worker for worker in self.workers_of(job_id) if worker["state"] == "busy"]

        [worker] = until(look, f"job {job_id} has a worker", lambda: self.state(job_id))
        return worker

    def refused(self, model: Path, device: str | None = "cuda", **options: Any) -> tuple[str, str]:
        """For which field such a job is refused, and why."""
        with pytest.raises(EvalError) as refused:
            self.job_on(model, device, **options)
        assert refused.value.response.status_code == 422
        [problem] = refused.value.fields
        return problem["field"], problem["problem"]


@contextmanager
def gpu_box(
    folder: Path, nvml: FakeNvml, *settings: str, evaluators: int = 1, computes: bool = False
) -> Generator[GpuBox]:
    """A server with its data in `folder` on the GPUs that `nvml` shows; `settings` are lines of its TOML file.

    Whether workers on one GPU compute in truth: `computes`.
    """
    folder.mkdir(exist_ok=True)
    config = folder / "evalpool.toml"
    config.write_text("\n".join((f"evaluators = {evaluators}", "cpu_workers = 1", *settings)))
    arguments = ("--config", config, "--include-path", write_tasks(folder / "tasks"))
    with pytest.MonkeyPatch.context() as patch:
        nvml.install(patch)
        variables = {COMPUTES: "1"} if computes else {}
        with (
            run_server(folder / "data", *arguments, program=PROGRAM, variables=variables) as server,
            GpuBox(server) as box,
        ):
            yield box


def with_weights(model: Path, folder: Path, gib: int) -> Path:
    """The model with a header that says it has so many GiB more."""
    shutil.copytree(model, folder)
    tensor = {"dtype": "F32", "shape": [gib, 1024, 1024, 256], "data_offsets": [0, 0]}
    header = json.dumps({"model.layers.0.mlp.gate_proj.weight": tensor}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder
