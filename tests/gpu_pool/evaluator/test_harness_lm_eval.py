"""Prompts are lm-eval's own, byte for byte, though templates are compiled once and documents come by portions."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import lm_eval.utils
import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from gpu_pool.evaluator import harness_lm_eval as harness
from gpu_pool.evaluator.catalogue import TaskLibrary
from gpu_pool.evaluator.generation_options import generation_options
from gpu_pool.evaluator.prompts import PromptEncoder
from gpu_pool.records import Evaluation, ModelArgs

CHAT = {"apply_chat_template": True, "system_instruction": "Be brief."}
CASES: dict[str, dict[str, Any]] = {
    "first examples": {"tasks": ["mmlu_anatomy", "mmlu_astronomy"], "num_fewshot": 5, "limit": 9},
    "random examples": {"tasks": ["gsm8k", "arc_easy"], "num_fewshot": 3, "limit": 9},
    "another seed": {"tasks": ["gsm8k", "arc_easy"], "num_fewshot": 3, "limit": 9, "fewshot_random_seed": 7},
    "examples from what is evaluated": {"tasks": ["local_choice", "local_generation"]},
    "conversations": {"tasks": ["gsm8k", "mmlu_anatomy"], "num_fewshot": 2, "limit": 7, "fewshot_as_multiturn": True}
    | CHAT,
    "one turn": {"tasks": ["gsm8k", "piqa"], "num_fewshot": 2, "limit": 7, "fewshot_as_multiturn": False} | CHAT,
    "inputs instead of choices": {"tasks": ["winogrande"], "num_fewshot": 2, "limit": 7},
    "without examples": {"tasks": ["lambada_openai", "local_cloze", "local_rolling"], "limit": 9},
}


class Recorder(LM):
    """Writes down what it is asked."""

    tokenizer_name = "none"

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self._encoder = encoder

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._encoder.chat_template(chat_template)

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return self._encoder.apply_chat_template(True, chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Any) -> list[Any]:
        return self._record(requests, (-1.0, False))

    def loglikelihood_rolling(self, requests: Any) -> list[Any]:
        return self._record(requests, -1.0)

    def generate_until(self, requests: Any) -> list[Any]:
        return self._record(requests, "")

    def _record(self, requests: Any, answer: Any) -> list[Any]:
        self.asked.update(map(_line, requests))
        return [answer] * len(requests)


def _line(instance: Any) -> str:
    return json.dumps([instance.task_name, instance.doc_id, instance.idx, instance.request_type, instance.args])


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> PromptEncoder:
    return PromptEncoder(ModelArgs(pretrained=str(tiny_model)))


@pytest.fixture(scope="module")
def library(benchmark_data: Path, local_tasks: Path, data_dir: Path) -> Any:
    """The library over real data; `datasets.load_dataset` reads that too until the end of this file."""
    settings = tomllib.loads((benchmark_data / "dataset_roots.toml").read_text())
    roots = {name: str(benchmark_data / path) for name, path in settings["dataset_roots"].items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", datasets.load_dataset)
        yield TaskLibrary(data_dir, [str(local_tasks)], roots, False)


@pytest.fixture(scope="module")
def manager(local_tasks: Path, library: TaskLibrary) -> TaskManager:
    stock = Path(lm_eval.tasks.__file__).parent
    folders = [stock / name for name in ("mmlu/default", "gsm8k", "arc", "piqa", "winogrande", "lambada")]
    return TaskManager(include_path=[str(folder) for folder in [*folders, local_tasks]], include_defaults=False)


@pytest.mark.parametrize("case", CASES)
def test_prompts(
    case: str, library: TaskLibrary, manager: TaskManager, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CASES[case]
    theirs = Recorder(encoder)
    simple_evaluate(theirs, task_manager=manager, bootstrap_iters=0, **options)

    monkeypatch.setattr(lm_eval.utils.env, "from_string", lm_eval.utils.env.from_string)  # put back after the test
    harness.memoise_templates()
    evaluation = Evaluation(model="m", **options | {"tasks": tuple(options["tasks"])})
    assert _asked(library, evaluation, encoder) == theirs.asked


def _asked(library: TaskLibrary, evaluation: Evaluation, encoder: PromptEncoder) -> Counter[str]:
    def template(history: Any, add_generation_prompt: bool = True) -> str:
        return encoder.apply_chat_template(True, history, add_generation_prompt)

    harness.seed_everything(evaluation)
    tasks = library.load(evaluation.tasks)["tasks"]
    for name, task in tasks.items():
        harness.configure_task(name, task, evaluation, allow_code=False)
    asked: Counter[str] = Counter()
    sizes = itertools.chain([1, 2], itertools.repeat(3))
    for task in tasks.values():
        chat_template = template if evaluation.apply_chat_template else None
        portions = list(harness.build_instances(task, evaluation, chat_template, sizes))
        assert list(itertools.chain(*portions)) == task.instances
        for instance in task.instances:
            asked[_line(instance)] += instance.repeats or 1
    return asked


def test_portions() -> None:
    assert list(itertools.islice(harness.portions(is_first=True), 4)) == [32, 512, 1024, 2048]
    assert list(itertools.islice(harness.portions(is_first=False), 3)) == [512, 1024, 2048]


@pytest.mark.parametrize("key", ["max_gen_toks", "max_new_tokens"])
def test_the_request_says_how_long_answers_are(library: TaskLibrary, key: str) -> None:
    task = library.load(["local_generation"])["tasks"]["local_generation"]
    assert task.get_config("generation_kwargs")["max_gen_toks"] != 1
    evaluation = Evaluation(model="m", tasks=("local_generation",), gen_kwargs={key: 1})
    harness.configure_task("local_generation", task, evaluation, allow_code=False)
    assert generation_options(task.get_config("generation_kwargs"), None).max_gen_toks == 1
