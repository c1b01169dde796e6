"""Models that read images: jobs through the REST API beside lm-eval's `hf-multimodal`, the same tasks, in turns.

    python scripts/bench_multimodal.py [--model small|smolvlm|FOLDER] [--documents 64] [--rounds 2] [--json]

`small` is a trained model of a million parameters that reads handwritten digits, `smolvlm` one of SmolVLM-256M's shape
with random weights, which is asked about parts of photographs. Both sides have one CPU thread, or the same GPU.

Ours is the whole job, from POST /evaluate to the last result file, on a warm model with the response cache off;
lm-eval's is what its backend takes to answer all requests at the fastest of --hf-batch-sizes, without loading the
model, building the requests and scoring. CPU seconds are of our worker, and of lm-eval's process. Multiple choice about
an image is refused by `hf-multimodal`: ours alone. Prompt tokens include those of images.

lmms-eval's own backends are not run: they need torchvision, qwen-vl-utils and others at import, where it is installed
without its requirements.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_pool import Pool, Run
from image_tasks import write_digits, write_pictures
from local_server import running_server
from machine import ROOT, describe_machine
from make_smolvlm import make_smolvlm
from report import print_report

from server.client import EvalClient

SMALL = ROOT / "tests" / "data" / "tiny-vlm-digits"
PART = 8
"""Documents on which lm-eval's batch sizes are compared, at least two batches of each size."""

Json = dict[str, Any]


class Reference:
    """lm-eval, in a process of its own for each turn."""

    def __init__(self, request: Json, folder: Path, threads: int) -> None:
        self._request = request
        self._folder = folder
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}

    def run(self, task: str, runs: Sequence[tuple[int, int]]) -> list[Json]:
        """What each of `runs` (batch size, documents) cost. Raises RuntimeError with what it said."""
        request_file, result_file = self._folder / "request.json", self._folder / "result.json"
        request_file.write_text(json.dumps({**self._request, "task": task, "runs": runs}))
        command = [sys.executable, Path(__file__).with_name("multimodal_reference.py"), request_file, result_file]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)
        if done.returncode:
            raise RuntimeError(f"lm-eval failed:\n{done.stderr}")
        return json.loads(result_file.read_text())

    def best_batch_size(self, task: str, sizes: Sequence[int], documents: int) -> int:
        """The one that takes least time a document."""
        runs = [(1, 1), *((size, min(documents, max(PART, 2 * size))) for size in sizes)]  # the first pays for starting
        found = self.run(task, runs)[1:]
        return min(found, key=lambda cost: cost["seconds"] / cost["documents"])["batch_size"]


def main() -> int:
    arguments = parse_arguments()
    machine = describe_machine()
    device = "cuda" if machine.gpus else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tasks = prepare(arguments, folder)
        how: Json = {"dtype": arguments.dtype, "device": device, "threads": 1}
        reference = Reference({"model": str(model), "include_path": str(folder / "tasks"), **how}, folder, 1)
        options = ("--include-path", folder / "tasks", "--cpu-workers", 1)
        with running_server(folder, *options) as url, EvalClient(url) as client:
            job: Json = {
                "model": "hf",
                "model_args": {"pretrained": str(model), "dtype": arguments.dtype},
                "device": device,
                "apply_chat_template": True,
                "bootstrap_iters": 0,
                "use_cache": False,
            }
            rows = [compare(client, reference, {**job, "tasks": [tasks[0]]}, arguments)]
            rows.append(ours_alone(client, {**job, "tasks": [tasks[1]]}, arguments))
    facts = {"model": arguments.model, "dtype": arguments.dtype, "device": device, "documents": arguments.documents}
    print_report("Models that read images", machine, rows, facts, as_json=arguments.json)
    return 0


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Path, tuple[str, str]]:
    """The checkpoint; a task of generation and one of multiple choice, in the folder `tasks`."""
    tasks = folder / "tasks"
    tasks.mkdir()
    if arguments.model == "small":
        write_digits(tasks, arguments.documents)
        return SMALL, ("digits", "digits_choice")
    write_pictures(tasks, arguments.documents, arguments.new_tokens)
    if arguments.model == "smolvlm":
        make_smolvlm(folder / "smolvlm")
        return folder / "smolvlm", ("pictures", "pictures_choice")
    return Path(arguments.model).absolute(), ("pictures", "pictures_choice")


def compare(client: EvalClient, reference: Reference, job: Json, arguments: argparse.Namespace) -> Json:
    """A row of both sides' median costs a document, and how many texts differ."""
    pool, [task] = Pool(client), job["tasks"]
    size = reference.best_batch_size(task, arguments.hf_batch_sizes, arguments.documents)
    theirs: list[Json] = []
    ours: list[Run] = []
    for _ in range(arguments.rounds):
        theirs += reference.run(task, [(1, 1), (size, arguments.documents)])[1:]
        pool.warm_up({**job, "limit": 1}, 1)
        ours.append(pool.run(job))
    last = client.jobs(limit=1)["jobs"][0]["job_id"]
    texts = {str(sample["doc_id"]): sample["resps"][0][0] for sample in client.samples(last, task)}
    counted = theirs[-1]
    seconds = statistics.median(run.seconds for run in ours)
    return {
        **costs(task, ours, arguments.documents),
        "prompt tokens/s": counted["prompt_tokens"] / seconds,
        "image tokens/s": counted["image_tokens"] / seconds,
        "HF batch": size,
        "HF docs/s": arguments.documents / statistics.median(cost["seconds"] for cost in theirs),
        "HF CPU s/doc": statistics.median(cost["cpu_seconds"] for cost in theirs) / arguments.documents,
        "ratio": statistics.median(their["seconds"] / our.seconds for their, our in zip(theirs, ours, strict=True)),
        "texts differ": f"{sum(texts[key] != text for key, text in counted['texts'].items())} of {len(texts)}",
    }


def ours_alone(client: EvalClient, job: Json, arguments: argparse.Namespace) -> Json:
    pool, [task] = Pool(client), job["tasks"]
    pool.warm_up({**job, "limit": 1}, 1)
    return costs(task, [pool.run(job) for _ in range(arguments.rounds)], arguments.documents)


def costs(task: str, runs: Sequence[Run], documents: int) -> Json:
    return {
        "task": task,
        "ours docs/s": documents / statistics.median(run.seconds for run in runs),
        "ours CPU s/doc": statistics.median(run.worker_cpu_seconds for run in runs) / documents,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small, smolvlm, or a checkpoint folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16, help="of each answer about a photograph")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hf-batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
