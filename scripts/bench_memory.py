"""Memory of the worker and the evaluator over a long job: flat, or does something grow with its documents?

    python scripts/bench_memory.py [--documents 10000] [--images 5000] [--every 1.0] [--json]

Two jobs, each with a real server of its own with one CPU worker, without the response cache: multiple choice of
--documents made-up questions on a random Llama of two layers, and --images handwritten digits on the vision-language
model of tests/data, of which each is another picture (no two files are alike).

A process's memory is its private part and its share of what others use, too (Pss of /proc/PID/smaps_rollup), every
second (--every) while the job runs: the mean of those looks that fall into each tenth of its requests.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from image_tasks import write_digits
from local_server import running_server
from machine import ROOT, describe_machine
from report import print_report

from server.client import EvalClient

SMALL = ROOT / "tests" / "data" / "tiny-vlm-digits"
CHOICES = 4
WORDS = ("the", "of", "a", "model", "question", "answer", "paper", "river", "evening", "letter", "stone", "garden")
PARTS = 10

Json = dict[str, Any]


def main() -> int:
    arguments = parse_arguments()
    rows: list[Json] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.documents:
            model = folder / "model"
            subprocess.run([sys.executable, ROOT / "tests" / "support" / "make_tiny_model.py", model], check=True)
            write_questions(folder / "text", arguments.documents)
            rows += watch(folder / "text", model, "questions", CHOICES * arguments.documents, arguments.every, {})
        if arguments.images:
            (folder / "seen").mkdir()
            write_digits(folder / "seen", arguments.images)
            chat = {"apply_chat_template": True}
            rows += watch(folder / "seen", SMALL, "digits", arguments.images, arguments.every, chat)
    print_report("Memory over a job, MiB", describe_machine(), rows, {}, as_json=arguments.json)
    return 0


def write_questions(folder: Path, number: int) -> None:
    """The task `questions`: each with a text of its own of about forty words, and four choices."""
    folder.mkdir()
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=40)) for _ in range(number)]
    (folder / "questions.txt").write_text("\n".join(f"{place} {line}" for place, line in enumerate(lines)))
    task = {
        "task": "questions",
        "dataset_path": "text",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.txt")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["one", "two", "three", "four"][:CHOICES],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "questions.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def watch(folder: Path, model: Path, task: str, requests: int, seconds: float, more: Json) -> Iterator[Json]:
    """A row for each kind of process: its memory in each tenth of the job, which has so many requests.

    Raises RuntimeError when the job fails, or ends before a look at both kinds.
    """
    looks: dict[str, list[tuple[float, float]]] = {"worker": [], "evaluator": []}
    with (
        running_server(folder, "--include-path", folder, "--cpu-workers", 1) as url,
        EvalClient(url) as client,
    ):
        fields = {"use_cache": False, "bootstrap_iters": 0, "log_samples": True, **more}
        submitted = client.evaluate("hf", [task], {"pretrained": str(model), "dtype": "float32"}, **fields)

        def look(job: Json) -> None:
            progress = job["progress"]
            if job["status"] != "running" or not progress or not progress["done"]:
                return
            log = folder / "data" / "jobs" / submitted["job_id"] / "job.log"
            processes = {
                "worker": [worker["pid"] for worker in client.workers()["workers"]],
                "evaluator": processes_that_write(log),
            }
            for kind, pids in processes.items():
                for pid in pids:
                    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since: so has the job
                        looks[kind].append((progress["done"] / requests, memory_mib(pid)))

        job = client.wait_for_job(submitted["job_id"], poll_interval=seconds, verbose=False, on_progress=look)
        if job["status"] != "completed":
            raise RuntimeError(f"the job is {job['status']}: {job['error']}")
    for kind, seen in looks.items():
        if not seen:
            raise RuntimeError(f"the job ended before a look at its {kind}: ask for more documents, or look more often")
        found: Json = {"job": task, "process": kind}
        for part in range(PARTS):
            some = [mib for share, mib in seen if part <= share * PARTS < part + 1]
            found[f"{(part + 1) * 100 // PARTS} %"] = statistics.mean(some) if some else None
        yield found


def memory_mib(pid: int) -> float:
    """Pss of a process."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def processes_that_write(log: Path) -> list[int]:
    """Whose standard error this file is: one, or none where it has ended."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # not ours, or gone
            if (folder / "fd" / "2").readlink() == log.resolve():
                found.append(int(folder.name))
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000, help="of text; 0: not this job")
    parser.add_argument("--images", type=int, default=5_000, help="0: not this job")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two looks (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
