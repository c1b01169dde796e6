"""Do evalpool's answers equal those of lm-eval's HF backend? The same checkpoint in fp32, the cache off.

    python scripts/bench_parity.py [--model FOLDER] [--limit 100] [--batch-sizes 1 7 auto] [--workers 1 2] [--json]

Prints one row a case, batch size and number of workers: the largest difference of a log-probability and of a score,
relative to max(1, |value|), and how many texts or greedy flags differ. Exit code 1 when any is above its limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fetch_real_data
from local_server import running_server
from machine import describe_machine
from report import print_report

from server.client import EvalClient

Json = dict[str, Any]
TOLERANCE = 1e-5  # of log-probabilities and of scores, as the design promises it for fp32
CASES: dict[str, Json] = {
    "arc_easy": {"tasks": ["arc_easy"]},
    "piqa": {"tasks": ["piqa"]},
    "hellaswag": {"tasks": ["hellaswag"]},
    "mmlu 5-shot": {"tasks": ["mmlu_anatomy"], "num_fewshot": 5},
    "lambada": {"tasks": ["lambada_openai"]},
    "gsm8k 5-shot": {"tasks": ["gsm8k"], "num_fewshot": 5, "gen_kwargs": {"max_gen_toks": 64}},
}


class Difference(NamedTuple):
    """How far two sets of answers are apart."""

    logprob: float
    """Largest difference of a log-probability, relative to max(1, |logp|)."""
    score: float
    """Largest relative difference of a score."""
    other: int
    """Greedy flags and texts that differ."""
    compared: int
    """Log-probabilities, flags and texts compared."""

    @property
    def acceptable(self) -> bool:
        return self.logprob <= TOLERANCE and self.score <= TOLERANCE and self.other == 0 and self.compared > 0

    def columns(self) -> Json:
        """For the table."""
        return {
            "max Δ logp": self.logprob,
            "max Δ score": self.score,
            "texts and flags that differ": self.other,
            "compared": self.compared,
            "equal": self.acceptable,
        }


def reference_answers(model: Path, config: Path, cases: dict[str, Json], batch_size: int = 1) -> Json:
    """What lm-eval's HF backend says, in a process of its own; by case "results" and "samples"."""
    with tempfile.TemporaryDirectory() as folder:
        request_file, result_file = Path(folder) / "request.json", Path(folder) / "result.json"
        request = {"model": str(model), "config": str(config), "cases": cases, "batch_size": batch_size}
        request_file.write_text(json.dumps(request))
        script = Path(__file__).with_name("hf_reference.py")
        command = [sys.executable, script, request_file, result_file]
        run = subprocess.run(command, capture_output=True, text=True, check=False)  # its bars are of no interest
        if run.returncode:
            raise RuntimeError(f"lm-eval's own run failed:\n{run.stderr}")
        return json.loads(result_file.read_text())


def our_answers(client: EvalClient, model: Path, case: Json, batch_size: int | str, workers: int) -> Json:
    """What evalpool says: "results" and "samples" of one case. Raises server.client.JobFailed."""
    arguments = {"pretrained": str(model), "dtype": "float32"}
    options = {"batch_size": batch_size, "num_gpus": workers, "use_cache": False, "bootstrap_iters": 0}
    job = client.evaluate("hf", model_args=arguments, **case, **options)
    job = client.wait_for_job(job["job_id"], verbose=False)
    samples = {
        task: {str(sample["doc_id"]): sample["resps"] for sample in client.samples(job["job_id"], task)}
        for task in case["tasks"]
    }
    return {"results": job["metrics"], "samples": samples, "workers": job["progress"]["workers"]}


def difference(reference: Json, ours: Json) -> Difference:
    """Compare two answers to one case; raises ValueError when they are not about the same documents."""
    logprobs, others = [0.0], []
    for task, documents in reference["samples"].items():
        found = ours["samples"][task]
        if found.keys() != documents.keys():
            raise ValueError(f"{task}: documents differ: {sorted(documents.keys() ^ found.keys())[:5]}")
        for document, answers in documents.items():
            for theirs, mine in zip(_leaves(answers), _leaves(found[document]), strict=True):
                if isinstance(theirs, float):
                    logprobs.append(_relative(theirs, float(mine)))
                else:
                    others.append(str(theirs) != str(mine))
    scores = [_relative(theirs, mine) for theirs, mine in _score_pairs(reference["results"], ours["results"])]
    return Difference(max(logprobs), max(scores), sum(others), len(logprobs) - 1 + len(others))


def _leaves(answers: Any) -> Iterator[Any]:
    if isinstance(answers, list):
        for answer in answers:
            yield from _leaves(answer)
    else:
        yield answers


def _relative(reference: float, value: float) -> float:
    return abs(reference - value) / max(1.0, abs(reference))


def _score_pairs(reference: Json, ours: Json) -> Iterator[tuple[float, float]]:
    for task, scores in reference.items():
        for key, value in scores.items():
            if "," in key and "_stderr" not in key:
                yield value, ours[task][key]


def main() -> int:
    arguments = parse_arguments()
    model = arguments.model or fetch_real_data.smollm2()
    config = fetch_real_data.benchmarks() / "dataset_roots.toml"
    cases = {name: {**case, "limit": arguments.limit} for name, case in CASES.items()}
    rows: list[Json] = []
    reference = reference_answers(model, config, cases)
    options = ("--config", config, "--cpu-workers", max(arguments.workers))
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), *options) as url,
        EvalClient(url) as client,
    ):
        for name, case in cases.items():
            for batch_size in arguments.batch_sizes:
                for workers in arguments.workers:
                    ours = our_answers(client, model, case, batch_size, workers)
                    found = difference(reference[name], ours)
                    used = f"{len(ours['workers'])} of {workers}"
                    rows.append({"case": name, "batch": batch_size, "workers": used, **found.columns()})
    facts = {"model": model.name, "documents of each task": arguments.limit, "tolerance": TOLERANCE}
    print_report("Parity with lm-eval's HF backend, fp32", describe_machine(), rows, facts, as_json=arguments.json)
    return 0 if all(row["equal"] for row in rows) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--limit", type=int, default=100, help="documents of each task")
    parser.add_argument("--batch-sizes", nargs="+", type=_batch_size, default=[1, 7, "auto"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    return parser.parse_args()


def _batch_size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


if __name__ == "__main__":
    sys.exit(main())
