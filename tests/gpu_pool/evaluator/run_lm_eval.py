"""lm-eval's own evaluation and result files: `python run_lm_eval.py REQUEST_JSON FOLDER` (see the tests of parity)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["DISABLE_MULTIPROC"] = "1"

from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager


def main(request: dict, folder: Path) -> None:
    manager = TaskManager(include_path=request["tasks"], include_defaults=False)
    for name, options in request["options"].items():
        tracker = EvaluationTracker(output_path=str(folder / name))
        results = simple_evaluate(
            model=request.get("backend", "hf"),
            model_args={"pretrained": request["model"], "dtype": "float32"},
            device="cpu",
            batch_size=1,  # its batches change what it lets an encoder-decoder generate
            task_manager=manager,
            evaluation_tracker=tracker,
            bootstrap_iters=request["iterations"],
            **options,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
