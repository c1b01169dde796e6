"""Drop-in: the reference's own client module, unmodified, drives full jobs against `evalpool serve`."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from digits import write_digits
from evalpool_server import Server, run_server

QUESTIONS = [("What colour is snow?", ["white", "black"], 0), ("How many legs has a cat?", ["two", "four"], 1)]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""
NINE_KEYS = {
    *("job_id", "status", "created_at", "started_at", "completed_at"),
    *("request", "result", "error", "position_in_queue"),
}
WAIT = {"poll_interval": 0.1, "timeout": 300.0, "verbose": False}


@pytest.fixture(scope="module")
def reference(reference_client_file: Path) -> ModuleType:
    """The module `client.py` of the wheel, loaded from its file."""
    spec = importlib.util.spec_from_file_location("reference_client", reference_client_file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """A server that knows a local task of text, and those of digits."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    rows = ({"question": question, "choices": choices, "gold": gold} for question, choices, gold in QUESTIONS * 4)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local_choice.yaml").write_text(TASK.format(data=data))
    write_digits(folder)
    with run_server(folder / "data", "--include-path", folder, "--cpu-workers", 1) as running:
        yield running


def check_completed(job: dict[str, Any], task: str = "local_choice", metric: str = "acc,none") -> None:
    """The reference's nine keys, its result shape, and files that hold what it says."""
    assert set(job) >= NINE_KEYS
    assert (job["status"], job["error"], job["position_in_queue"]) == ("completed", None, None)
    [files] = job["result"].values()
    results = json.loads(Path(files["results"]).read_text())
    assert 0 <= results["results"][task][metric] <= 1
    [samples] = files["samples"]
    assert Path(samples).name.endswith(".jsonl")
    assert len(Path(samples).read_text().splitlines()) == job["request"]["limit"]


def test_the_blocking_client(reference: ModuleType, server: Server, tiny_model: Path) -> None:
    with reference.EvalClient(server.url) as client:
        assert client.is_healthy()
        assert "local_choice" in client.list_tasks()
        assert "hf" in client.list_models()
        submitted = client.evaluate(
            model="hf",
            tasks=["local_choice"],
            model_args={"pretrained": str(tiny_model), "dtype": "float32"},
            num_fewshot=0,
            batch_size="auto",
            limit=6,
            gen_kwargs="temperature=0",
        )
        assert set(submitted) == {"job_id", "status", "position_in_queue", "message"}
        assert (submitted["status"], submitted["position_in_queue"]) == ("queued", 0)
        check_completed(client.wait_for_job(submitted["job_id"], **WAIT))
        queue = client.get_queue_status()
        assert (queue["queue_size"], queue["running_job"], queue["failed_jobs"]) == (0, None, 0)
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            client.cancel_job(submitted["job_id"])
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            client.get_job("no-such-job")


def test_a_model_that_reads_images_by_its_name_there(
    reference: ModuleType, server: Server, tiny_vlm: Callable[[str], Path]
) -> None:
    """With the arguments that its own model class takes by default."""
    where = {"pretrained": str(tiny_vlm("qwen2_5_vl")), "max_pixels": 1_605_632, "min_pixels": 256 * 28 * 28}
    with reference.EvalClient(server.url) as client:
        assert "qwen2_5_vl" in client.list_models()
        submitted = client.evaluate(
            model="qwen2_5_vl",
            tasks=["digits"],
            model_args={**where, "device_map": "auto", "attn_implementation": "sdpa"},
            batch_size=2,
            limit=5,
        )
        check_completed(client.wait_for_job(submitted["job_id"], **WAIT), "digits", "exact_match,digit")


async def test_the_async_client(reference: ModuleType, server: Server, tiny_model: Path) -> None:
    async with reference.AsyncEvalClient(server.url) as client:
        assert (await client.health())["status"] == "healthy"
        submitted = await client.evaluate(
            model="hf", tasks=["local_choice"], model_args={"pretrained": str(tiny_model)}, limit=3
        )
        check_completed(await client.wait_for_job(submitted["job_id"], **WAIT))
        assert (await client.get_queue_status())["completed_jobs"] >= 1


@pytest.mark.slow
def test_merging(reference: ModuleType, server: Server, distcp_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(distcp_checkpoint, tmp_path / "checkpoint-10")
    merged = {"success": True, "message": "Checkpoint merged successfully", "merged_path": str(folder)}
    with reference.EvalClient(server.url) as client:
        for kind in ("regular", "ema"):
            assert client.merge_checkpoint(str(folder), checkpoint_type=kind) == merged
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            client.merge_checkpoint(str(tmp_path / "nope"))


def test_a_hand_written_request(server: Server, tiny_model: Path) -> None:
    body = {"model": "hf", "tasks": ["local_choice"], "model_args": {"pretrained": str(tiny_model)}, "limit": 2}
    submitted = httpx.post(f"{server.url}/evaluate", json=body, timeout=None)
    assert submitted.status_code == 200
    shown = httpx.get(f"{server.url}/jobs/{submitted.json()['job_id']}", timeout=None).json()
    assert set(shown) >= NINE_KEYS
    defaults = {"num_fewshot": None, "log_samples": True, "predict_only": False, "num_gpus": 1, "output_dir": None}
    assert shown["request"].items() >= (body | defaults).items()
