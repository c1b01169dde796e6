"""The running service and what goes wrong in its workers: a request that kills them, a process that stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from evalpool_server import run_server
from fresh_models import change_json
from service import COMMON, Service, await_end, write_tasks

MODEL = """
import os, signal
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class FragileConfig(LlamaConfig):
    model_type = "fragile"

class FragileModel(LlamaForCausalLM):
    config_class = FragileConfig

    def reads_thrice(self, token, input_ids):  # as no text of the worker's own checks does
        found = (input_ids == token).reshape(-1)
        return (found[2:] & found[1:-1] & found[:-2]).any()

    def forward(self, input_ids=None, **arguments):
        if self.reads_thrice(self.config.deadly_token, input_ids):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.reads_thrice(self.config.losing_token, input_ids):
            lost = Path(self.config.device_is_lost)
            if lost.exists():
                lost.unlink()
                raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return super().forward(input_ids=input_ids, **arguments)
"""
CLOZE = """
task: {name}
output_type: loglikelihood
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: " yes"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
STALL_SECONDS = 4.0
"""Less than between two reports that a worker is silent: at the second one it is killed."""

UNRESPONSIVE_SECONDS = 15.0
"""More than a process needs to start to answer, on a loaded machine."""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """One CPU worker; one that hangs is killed soon."""
    folder = tmp_path_factory.mktemp("box")
    tasks = write_tasks(folder / "tasks")
    for name, odd in (("with_poison", "~~~"), ("without_poison", "seven"), ("with_loss", "^^^")):
        rows = [{"question": f"is {odd if number == 2 else number} a lucky number?"} for number in range(4)]
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = CLOZE.format(name=name) + COMMON.format(data=tasks / f"{name}.jsonl")
        (tasks / f"{name}.yaml").write_text(task)
    config = folder / "evalpool.toml"
    limits = f"worker_stall_s = {STALL_SECONDS}\nunresponsive_s = {UNRESPONSIVE_SECONDS}\n"
    config.write_text(f"{limits}allow_remote_code = true\n")
    arguments = ("--config", config, "--include-path", tasks, "--cpu-workers", 1)
    with run_server(folder / "data", *arguments) as server, Service(server) as service:
        yield service


@pytest.fixture(scope="module")
def fragile_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a class of its own, which kills its process when it reads "~~~".

    While there is a file `lost` beside it, it removes that when it reads "^^^", and its device is lost.
    """
    from tokenizers import Tokenizer

    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("fragile") / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (deadly,), (losing,) = (set(tokenizer.encode(text).ids) for text in ("~~~", "^^^"))
    (folder / "fragile.py").write_text(MODEL)
    classes = {"AutoConfig": "fragile.FragileConfig", "AutoModelForCausalLM": "fragile.FragileModel"}
    change_json(folder / "config.json", model_type="fragile", auto_map=classes, deadly_token=deadly)
    change_json(folder / "config.json", losing_token=losing, device_is_lost=str(folder.with_name("lost")))
    return folder


def submit(box: Service, model: Path, task: str, **options: Any) -> str:
    model_args = {"pretrained": str(model), "trust_remote_code": True}
    return box.client.evaluate("hf", [task], model_args, device="cpu", use_cache=False, **options)["job_id"]


def test_a_request_that_kills_ends_in_an_error_and_nothing_else_does(box: Service, fragile_model: Path):
    poisoned = submit(box, fragile_model, "with_poison", max_error_share=0.25)
    neighbour = submit(box, fragile_model, "without_poison")
    job = box.finished(poisoned)
    assert job["attempt"] == 1
    assert job["progress"]["errored"] == 1
    assert job["progress"]["tasks"] == {"with_poison": {"done": 4, "total": 4, "errored": 1}}
    [files] = job["result"].values()
    errors = json.loads(Path(files["results"]).read_text())["evalpool"]["errors"]
    assert errors["tasks"]["with_poison"] == {
        "answered": 3,
        "errored_excluded": 1,
        "documents_excluded": 1,
        "causes": {"its worker process ended: killed by SIGSEGV": 1},
    }
    samples = list(box.client.samples(poisoned))
    assert [sample["doc_id"] for sample in samples if "evalpool_error" in sample] == [2]
    assert box.finished(neighbour)["progress"]["errored"] == 0


def test_a_job_that_allows_no_errors_fails_with_the_cause(box: Service, fragile_model: Path):
    job = box.ended(submit(box, fragile_model, "with_poison"))
    assert job["status"] == "failed"
    assert "1 of 4 requests" in job["error"]
    assert "its worker process ended: killed by SIGSEGV (1)" in job["error"]


def test_a_worker_whose_device_is_lost_ends_and_another_one_answers(box: Service, fragile_model: Path):
    lost = fragile_model.with_name("lost")
    lost.touch()
    job = box.finished(submit(box, fragile_model, "with_loss"))
    assert not lost.exists()
    assert (job["attempt"], job["progress"]["errored"]) == (1, 0)
    assert job["metrics"]["with_loss"] == box.finished(submit(box, fragile_model, "with_loss"))["metrics"]["with_loss"]
    logs = [log.read_text() for log in (box.server.data_dir / "logs").glob("worker-*.log")]
    [last_words] = [log.splitlines()[-1] for log in logs if "AcceleratorError" in log]
    assert last_words == "the worker ends: AcceleratorError: CUDA error: unspecified launch failure"


def test_a_worker_that_stops_is_killed_and_replaced(box: Service, tiny_model: Path):
    job_id = box.submit(tiny_model, "long_story", limit=100)
    box.answering(job_id)
    [worker] = box.workers_of(job_id)
    os.kill(worker["pid"], signal.SIGSTOP)
    await_end(worker["pid"])
    assert box.finished(job_id)["progress"]["done"] == 100
    why = f"made no progress for {STALL_SECONDS:g} s"
    assert f"{worker['worker_id']} has {why} and is killed" in box.log()
    events = [(event["event"], event["status"], event["cause"]) for event in box.client.events(job_id)["events"]]
    lost = f"{worker['worker_id']} ended: it {why} (worker_stall_s) and was killed"
    assert events == [
        ("submitted", "queued", None),
        ("started", "running", None),
        ("worker_lost", "running", lost),
        ("completed", "completed", None),
    ]


@pytest.mark.parametrize("removed", ["sockets", "folder"])
def test_a_worker_that_cannot_be_reached_is_replaced(box: Service, tiny_model: Path, removed: str):
    box.finished(box.submit(tiny_model, "quick_choice", limit=1))
    sockets = box.server.data_dir / "run"
    before = box.worker_pids()
    for path in [sockets] if removed == "folder" else sockets.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    job_id = box.submit(tiny_model, "quick_choice", limit=2)
    job = box.finished(job_id)
    assert (job["attempt"], job["progress"]["done"], job["progress"]["errored"]) == (1, 4, 0)
    assert not before.keys() & box.worker_pids().keys()
    [lost] = [event["cause"] for event in box.client.events(job_id)["events"] if event["event"] == "worker_lost"]
    worker_id, _, why = lost.partition(" cannot be reached: ")
    assert worker_id in before
    path = sockets.resolve() / f"{worker_id}.sock"
    assert why == f"FileNotFoundError: [Errno 2] No such file or directory ({path})"
    assert {path.stem for path in sockets.iterdir()} == box.worker_pids().keys()


def test_an_evaluator_and_a_desk_that_stop_are_killed_and_replaced(box: Service, tiny_model: Path):
    job_id = box.submit(tiny_model, "long_story", limit=100, use_cache=True)
    box.answering(job_id)
    stopped = [box.evaluator_pid(job_id), box.desk_pid()]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    asked_meanwhile = box.submit(tiny_model, "quick_choice", limit=1)  # the next desk checks it
    for pid in stopped:
        await_end(pid)
    assert box.finished(asked_meanwhile)["attempt"] == 1
    job = box.finished(job_id)
    assert (job["attempt"], job["progress"]["done"]) == (2, 100)
    why = f"it did not answer for {UNRESPONSIVE_SECONDS:g} s (unresponsive_s) and was killed"
    assert [event["cause"] for event in box.client.events(job_id)["events"] if event["event"] == "requeued"] == [
        f"the evaluator process ended: {why}"
    ]
