"""lmms-eval's steps on real tasks of its package, with answers that the test gives."""

from __future__ import annotations

import binascii
import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from lmms_data import DOCUMENTS, write_lmms_data
from PIL import Image
from stock_data import mmlu

from gpu_pool.evaluator import harness_lmms_eval
from gpu_pool.evaluator.catalogue import TaskLibrary
from gpu_pool.evaluator.harness import combine, harness_of
from gpu_pool.evaluator.harness_lm_eval import TaskError
from gpu_pool.evaluator.images import ImageProblem
from gpu_pool.evaluator.media_prompts import forget_media
from gpu_pool.evaluator.sounds import UndecodedVideo, media_file
from gpu_pool.evaluator.task_index import LMMS_EVAL_ROOT
from gpu_pool.records import Evaluation

pytestmark = pytest.mark.skipif(LMMS_EVAL_ROOT is None, reason="lmms-eval is not installed")

GROUP = "lmms:mmlu_other"
Answer = Callable[[Any], Any]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Generator[TaskLibrary]:
    folder = tmp_path_factory.mktemp("roots")
    roots = write_lmms_data(folder) | {"hails/mmlu_no_train": str(folder / "mmlu")}
    for config in MMLU_OTHER:
        for split, count in {"test": 4, "dev": 5, "validation": 5}.items():
            path = folder / "mmlu" / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(mmlu(count)).to_parquet(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", datasets.load_dataset)
        yield TaskLibrary(data_dir, (), roots, False)


MMLU_OTHER = (
    *("business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging"),
    *("management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting"),
    *("professional_medicine", "virology"),
)


def results_of(library: TaskLibrary, answer: Answer, *names: str, **options: Any) -> dict[str, Any]:
    evaluation = Evaluation(model="m", tasks=names, bootstrap_iters=10, **options)
    loaded = library.load(names)
    tasks: dict[str, Any] = loaded["tasks"]
    scores = {}
    for name, task in tasks.items():
        harness = harness_of(task)
        harness.configure_task(name, task, evaluation, False, modalities={"text", "image", "video"})
        for instances in harness.build_instances(task, evaluation, None, itertools.repeat(3)):
            for instance in instances:
                instance.resps.append(answer(instance))
        scores[name] = harness.score_task(name, task, evaluation)
        harness.release(task)
    return combine(tasks, scores, loaded.get("groups", {}))


def test_groups_are_weighted_as_lmms_eval_weighs_them(library: TaskLibrary) -> None:
    def first_is_best(instance: Any) -> tuple[float, bool]:
        return float(-instance.idx), False

    results = results_of(library, first_is_best, GROUP)
    assert results["results"][GROUP]["acc,none"] == pytest.approx(0.25)
    assert results["groups"][GROUP]["acc,none"] == pytest.approx(0.25)
    assert len(results["group_subtasks"][GROUP]) == len(MMLU_OTHER)
    members = results["group_subtasks"][GROUP]
    assert all(results["results"][name]["acc,none"] == pytest.approx(0.25) for name in members)
    assert "lmms:mmlu_nutrition" in members


@pytest.mark.parametrize(("limit", "counts"), [(0.5, [6, 6]), (0.1, [2, 2]), (4, [4, 4]), (100, [DOCUMENTS] * 2)])
def test_a_limit_is_each_tasks_own(library: TaskLibrary, limit: float, counts: list[int]) -> None:
    results = results_of(library, lambda _: "yes", "mme", "lmms:mmmu_val", limit=limit)
    sizes = [results["n-samples"][name] for name in ("mme", "lmms:mmmu_val")]
    assert sizes == [{"original": DOCUMENTS, "effective": count} for count in counts]


def test_an_error_is_raised_at_once_as_what_it_is(library: TaskLibrary) -> None:
    with pytest.raises(AssertionError, match="MME only supports pairwise evaluation"):
        results_of(library, lambda _: "yes", "mme", limit=3)


def test_examples_where_there_are_none_are_refused(library: TaskLibrary) -> None:
    with pytest.raises(TaskError, match="mme has no few-shot examples"):
        results_of(library, lambda _: "yes", "mme", num_fewshot=2)


def test_a_kind_of_model_has_prompts_of_its_own(library: TaskLibrary) -> None:
    def question(model: str) -> str:
        task = library.load(["lmms:mmmu_val"], model)["tasks"]["lmms:mmmu_val"].task
        return task.doc_to_text(task.eval_docs_no_media[0])

    assert question("qwen3_vl").startswith("Question: ")
    assert question("qwen2_5_vl") == question("/models/mine")
    assert not question("/models/mine").startswith("Question: ")


@pytest.mark.parametrize("with_template", [True, False])
@pytest.mark.parametrize("error", [binascii.Error("padding"), FileNotFoundError("a.png"), SystemExit("no video")])
def test_a_document_that_cannot_be_shown_says_why(
    library: TaskLibrary, error: BaseException, with_template: bool
) -> None:
    def show(doc: Any) -> Any:
        raise error

    [prompt, *_] = prompts_of(library, {"doc_to_visual": show}, with_template)
    [problem] = prompt.args[2]["visual"]
    assert isinstance(problem, ImageProblem)
    assert str(error) in str(problem)


@pytest.mark.parametrize("with_template", [True, False])
def test_an_error_of_a_task_s_text_is_the_task_s(library: TaskLibrary, with_template: bool) -> None:
    def say(doc: Any, kwargs: Any = None) -> str:
        raise ValueError("the question has no options")

    with pytest.raises(ValueError, match="the question has no options"):
        prompts_of(library, {"doc_to_text": say}, with_template)


@pytest.mark.parametrize("with_template", [True, False])
def test_a_video_in_a_data_set_is_its_bytes_and_leaves_memory(library: TaskLibrary, with_template: bool) -> None:
    def show(doc: Any) -> Any:
        return [UndecodedVideo({"bytes": b"frames", "path": "gone.mp4"})]

    instances = prompts_of(library, {"doc_to_visual": show}, with_template)
    [video] = instances[0].args[2]["visual"]
    assert media_file(video.file, "video", ()) == b"frames"
    forget_media(instances)
    digest = hashlib.sha256(b"frames").hexdigest()
    assert instances[0].args[2]["visual"] == [{"video": {"path": "gone.mp4", "sha256": digest, "bytes": 6}}]


@pytest.mark.parametrize("with_template", [True, False])
def test_portions_end_where_memory_would_not_hold_more_images(
    library: TaskLibrary, with_template: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness_lmms_eval, "MOST_DECODED_BYTES", 2 * 3 * 100 * 100)

    def show(doc: Any) -> Any:
        return [Image.new("RGB", (100, 100))]

    def counts(**changes: Any) -> list[int]:
        return [len(portion) for portion in portions_of(library, changes, with_template, sizes=4, limit=5)]

    assert counts(doc_to_visual=show) == [2, 2, 1]
    assert counts() == [4, 1]  # files as they are in the data set


@pytest.mark.parametrize(("given", "stops"), [({}, []), ({"until": "\n\n"}, "\n\n"), ({"until": ["."]}, ["."])])
def test_a_chat_ends_at_the_stop_strings_that_the_request_gives(
    library: TaskLibrary, given: dict[str, Any], stops: Any
) -> None:
    [prompt, *_] = prompts_of(library, {}, with_template=True, gen_kwargs=given)
    assert prompt.args[1]["until"] == stops


@pytest.mark.parametrize("with_template", [True, False])
def test_the_request_says_how_long_answers_are(library: TaskLibrary, with_template: bool) -> None:
    changes = {"generation_kwargs": {"max_gen_toks": 16, "until": []}}
    [prompt, *_] = prompts_of(library, changes, with_template, gen_kwargs={"max_new_tokens": 3})
    assert prompt.args[1] == {"max_new_tokens": 3, "do_sample": False, "until": []}


def prompts_of(library: TaskLibrary, changes: dict[str, Any], with_template: bool, **options: Any) -> list[Any]:
    """Two documents' of mme with a part of its code or options changed."""
    return list(itertools.chain.from_iterable(portions_of(library, changes, with_template, sizes=2, **options)))


def portions_of(
    library: TaskLibrary, changes: dict[str, Any], with_template: bool, *, sizes: int, limit: int = 2, **options: Any
) -> Iterator[list[Any]]:
    task = library.load(["mme"])["tasks"]["mme"]
    for name, code in changes.items():
        setattr(task.task.config, name, code)
    harness = harness_of(task)
    evaluation = Evaluation(model="m", tasks=("mme",), limit=limit, **options)
    harness.configure_task("mme", task, evaluation, False, modalities={"text", "image", "video"})
    template = (lambda turns: str(turns)) if with_template else None
    return harness.build_instances(task, evaluation, template, itertools.repeat(sizes))
