"""lmms-eval's own evaluation: `python run_lmms_eval.py REQUEST_JSON FILE` (see test_parity_lmms).

Its model is as small as can be: one prompt at a time through transformers, prompted as by lmms-eval's chat models (with
the model's chat template) or by its simple ones (the images before the text).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import torch
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager
from transformers import AutoModelForImageTextToText, AutoProcessor

from gpu_pool.evaluator.dataset_roots import DatasetRoots


class Plain(lmms):
    """Answers greedily."""

    def __init__(self, path: str, is_simple: bool) -> None:
        super().__init__()
        self.is_simple = is_simple
        self._processor: Any = AutoProcessor.from_pretrained(path)
        self._model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()

    def generate_until(self, requests: Any) -> list[str]:
        return [self._answer(*(self._simple if self.is_simple else self._chat)(*request.args)) for request in requests]

    def _chat(self, _context: str, messages: Any, options: Any, doc_id: int, task: str, split: str) -> Any:
        chat = ChatMessages(messages=messages(self.task_dict[task][split][doc_id]))
        text = self._processor.apply_chat_template(chat.to_hf_messages(), add_generation_prompt=True)
        return text, chat.extract_media()[0], options

    def _simple(self, context: str, options: Any, visuals: Any, doc_id: int, task: str, split: str) -> Any:
        images = visuals(self.task_dict[task][split][doc_id])
        return "<image>" * len(images) + context, images, options

    def _answer(self, text: str, images: list[Any], options: dict[str, Any]) -> str:
        inputs = self._processor(text=text, images=images, return_tensors="pt")
        with torch.inference_mode():
            made = self._model.generate(**inputs, max_new_tokens=options["max_new_tokens"], do_sample=False)
        return self._processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError("what lmms-eval makes of the answers is broken")

    def generate_until_multi_round(self, requests: Any) -> Any:
        raise NotImplementedError


def main(request: dict[str, Any], file: Path) -> None:
    DatasetRoots(request["roots"], file.parent / "cache").install()
    library = Path(lmms_eval.tasks.__file__).parent
    results: dict[str, Any] = {}
    for name, options in request["options"].items():
        manager = TaskManager(
            include_defaults=False, include_path=[str(library / folder) for folder in request["folders"]]
        )
        model = Plain(request["model"], options.pop("is_simple"))
        results[name] = simple_evaluate(model, task_manager=manager, bootstrap_iters=request["iterations"], **options)
    file.write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
