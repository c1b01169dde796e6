"""lm-eval's `hf-multimodal` on a task: `python multimodal_reference.py REQUEST_FILE RESULT_FILE` (bench_multimodal).

Measured is the backend's answering of all requests, without loading and without what lm-eval does before and after.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(DISABLE_MULTIPROC="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager

Json = dict[str, Any]


class Measured(HFMultimodalLM):
    """Counts what its model is given, and the time of it all."""

    def start(self) -> None:
        self.prompt_tokens = self.image_tokens = self.generated = 0
        self.seconds = self.cpu_seconds = 0.0

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        texts = super().generate_until(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        return texts

    def _model_multimodal_generate(self, inputs: Any, max_length: int, stop: Any, **options: Any) -> Any:
        self.prompt_tokens += int(inputs["attention_mask"].sum())
        self.image_tokens += int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        answer = super()._model_multimodal_generate(inputs, max_length, stop, **options)
        self.generated += answer.numel()
        return answer


def main(request: Json) -> list[Json]:
    """For each of request["batch_sizes"] the costs and the texts by document of request["task"]."""
    torch.set_num_threads(request["threads"])
    model = Measured(
        pretrained=request["model"], dtype=request["dtype"], device=request["device"], batch_size=1, max_length=2048
    )
    manager = TaskManager(include_path=request["include_path"], include_defaults=False)
    found: list[Json] = []
    for size, limit in request["runs"]:
        model.batch_size_per_gpu = size
        model.start()
        answer = simple_evaluate(
            model,
            tasks=[request["task"]],
            task_manager=manager,
            bootstrap_iters=0,
            limit=limit,
            apply_chat_template=True,
        )
        texts = {sample["doc_id"]: sample["resps"][0][0] for sample in answer["samples"][request["task"]]}
        found.append(
            {
                "batch_size": size,
                "documents": len(texts),
                "texts": texts,
                **{name: getattr(model, name) for name in ("prompt_tokens", "image_tokens", "seconds", "cpu_seconds")},
            }
        )
    return found


if __name__ == "__main__":
    request_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(main(json.loads(request_file.read_text()))))
