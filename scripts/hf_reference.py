"""lm-eval's own answers, by its HF backend: `python hf_reference.py REQUEST_FILE RESULT_FILE` (see bench_parity)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(DISABLE_MULTIPROC="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gpu_pool.evaluator.dataset_roots import DatasetRoots
from server.settings import load_settings


def main(request: dict[str, Any], cache: Path) -> dict[str, Any]:
    """For each case {"results": scores by task, "samples": answers by task and document}."""
    DatasetRoots(load_settings({}, Path(request["config"]), {}).pool.dataset_roots, cache).install()
    model = HFLM(pretrained=request["model"], dtype="float32", device="cpu", batch_size=request["batch_size"])
    manager = TaskManager()
    return {name: evaluate(model, manager, case) for name, case in request["cases"].items()}


def evaluate(model: HFLM, manager: TaskManager, case: dict[str, Any]) -> dict[str, Any]:
    found = simple_evaluate(model, task_manager=manager, bootstrap_iters=0, **case)
    answers = {task: {s["doc_id"]: s["resps"] for s in samples} for task, samples in found["samples"].items()}
    return {"results": found["results"], "samples": answers}


if __name__ == "__main__":
    request_file, result_file = map(Path, sys.argv[1:])
    answer = main(json.loads(request_file.read_text()), result_file.parent / "datasets")
    result_file.write_text(json.dumps(answer, default=str))
