"""Local tasks of every kind, and real evaluator and worker processes to run them."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from gpu_pool import messages as msg
from gpu_pool.evaluator.entry import evaluator_main
from gpu_pool.fingerprint import fingerprint_model, memo_path
from gpu_pool.records import Evaluation, ModelArgs, ModelSpec
from gpu_pool.worker.entry import worker_main

WORDS = ["city", "capital", "France", "Paris", "question", "answer", "course", "which", "these", "what"]

TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "num_fewshot": 2,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "local_choice_alone": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} ",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "local_cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices[0]}}",
        "num_fewshot": 1,
        "repeats": 2,
        "generation_kwargs": {"until": ["\n", "a"], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [
            {
                "name": "first-word",
                "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}],
            },
            {"name": "raw", "filter": [{"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
BLANK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": 0,
    "doc_to_choice": "{{[choices[0], '' if gold == 1 else choices[1]]}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
GROUP = {
    "group": "local_group",
    "task": ["local_choice", "local_choice_alone"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}

HELD = """
task: local_held
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/held.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: !function held.text
doc_to_target: " yes"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
HELD_CODE = """
def text(doc):
    if doc["wait"]:
        open(doc["wait"]).close()  # a FIFO: returns when another process opens it to write
    return f"Is {doc['number']} a number?"
"""


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An include folder with one task of every kind (TASKS) and a group, over twelve made-up documents.

    And `local_held`, of 100 documents, the last of which cannot be rendered before someone writes to `held.fifo`, and
    `local_blank`, a choice of which is an empty string in every third document.
    """
    folder = tmp_path_factory.mktemp("tasks")
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps(_document(i)) + "\n" for i in range(12)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents), "train": str(documents)}},
        "test_split": "test",
        "fewshot_split": "train",
        "metadata": {"version": 1.0},
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))  # JSON is YAML
    (folder / "local_blank.yaml").write_text(json.dumps({"task": "local_blank", **common, **BLANK}))
    (folder / "local_group.yaml").write_text(json.dumps(GROUP))
    os.mkfifo(folder / "held.fifo")
    held = [{"number": i, "wait": str(folder / "held.fifo") if i == 99 else ""} for i in range(100)]
    (folder / "held.jsonl").write_text("".join(json.dumps(document) + "\n" for document in held))
    (folder / "local_held.yaml").write_text(HELD.replace("FOLDER", str(folder)))
    (folder / "held.py").write_text(HELD_CODE)
    return folder


def _document(i: int) -> dict[str, Any]:
    words = [WORDS[(i * 3 + step) % len(WORDS)] for step in range(6)]
    return {
        "question": f"what is {words[0]} {words[1]} of {words[2]}?",
        "choices": [words[3], f"the {words[4]} {i}", words[5]],
        "gold": i % 3,
        "text": " ".join(words * (3 + 120 * (i == 0))),
    }


class Evaluator:
    """A real evaluator process and its control pipe."""

    def __init__(self, connection: Connection, model: ModelSpec, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self._connection = connection

    def send(self, message: msg.Message) -> None:
        """Send one message."""
        self._connection.send_bytes(msg.encode(message))

    def receive(self) -> msg.Message:
        """The next message that is not progress.

        Raises:
            EOFError: the process has ended.
        """
        while isinstance(message := msg.decode_from_evaluator(self._connection.recv_bytes()), msg.JobProgress):
            pass
        return message

    def start(
        self, job_id: str, model: ModelSpec | None = None, *, log_path: Path | None = None, **evaluation: Any
    ) -> Path:
        """Send RunJob; returns the job's folder, where its log is, too, unless `log_path` says otherwise."""
        model = model or self.model
        job_dir = self.folder / job_id
        job_dir.mkdir()
        self.send(
            msg.RunJob(
                job_id=job_id,
                evaluation=Evaluation(model=model.args.pretrained, **evaluation),
                model=model,
                output_dir=str(job_dir),
                log_path=str(log_path or job_dir / "job.log"),
            )
        )
        return job_dir

    def attach(self, job_id: str, worker_id: str, address: Path) -> None:
        """Send AttachWorker."""
        self.send(msg.AttachWorker(job_id=job_id, worker_id=worker_id, address=str(address)))

    def finish(self) -> list[msg.Message]:
        """Every message of the running job, the last one being JobDone or JobFailed."""
        messages = [self.receive()]
        while not isinstance(messages[-1], msg.EvaluatorReady):
            messages.append(self.receive())
        return messages[:-1]


StartEvaluator = Callable[..., Evaluator]
SpecOf = Callable[[Path], ModelSpec]


@pytest.fixture(scope="module")
def model(tiny_model: Path, spec_of: SpecOf) -> ModelSpec:
    """The tiny model in fp32."""
    return spec_of(tiny_model)


@pytest.fixture(scope="session")
def spec_of(data_dir: Path) -> SpecOf:
    """The checkpoint in a folder as it is now, in fp32."""

    def spec(folder: Path) -> ModelSpec:
        args = ModelArgs(pretrained=str(folder), dtype="float32")
        return ModelSpec(kind="hf", args=args, fingerprint=fingerprint_model(args, memo_path(data_dir)))

    return spec


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of all evaluators: the index of lm-eval's library is made once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def start_evaluator(
    tmp_path_factory: pytest.TempPathFactory, data_dir: Path, model: ModelSpec, local_tasks: Path
) -> Iterator[StartEvaluator]:
    """Start a real evaluator that knows the local tasks; it is ready when this returns."""
    with ExitStack() as processes:

        def start(dataset_roots: dict[str, str] | None = None) -> Evaluator:
            folder = tmp_path_factory.mktemp("evaluator")
            start = msg.EvaluatorStart(
                evaluator_id="e",
                data_dir=str(data_dir),
                log_path=str(folder / "evaluator.log"),
                include_paths=(str(local_tasks),),
                dataset_roots=dataset_roots or {},
            )
            evaluator = Evaluator(_spawn(processes, evaluator_main, start), model, folder)
            assert isinstance(evaluator.receive(), msg.EvaluatorReady)
            return evaluator

        yield start


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, model: ModelSpec) -> Iterator[Path]:
    """A real worker with the tiny model; the path of its data socket."""
    folder = tmp_path_factory.mktemp("worker")
    start = msg.WorkerStart(
        worker_id="real",
        spec=model,
        socket_path=str(folder / "data.sock"),
        log_path=str(folder / "worker.log"),
        data_dir=str(folder),
    )
    with ExitStack() as processes:
        connection = _spawn(processes, worker_main, start)
        assert isinstance(msg.decode_from_worker(connection.recv_bytes()), msg.WorkerReady)
        yield folder / "data.sock"


def _spawn(processes: ExitStack, target: Callable[..., None], start: msg.Record) -> Connection:
    """Start a child that is told to end, and waited for, when `processes` closes; returns its control pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, start, os.getpid()))
    process.start()
    theirs.close()
    processes.callback(process.join)
    processes.enter_context(closing(ours))
    return ours
