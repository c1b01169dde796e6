"""lmms-eval's tasks, from its installed package over local data, score as in its own evaluator; choices, whose
evaluation is broken there, as the model's own forward passes say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from digits import MODEL, held_out, image_bytes
from lmms_data import DOCUMENTS, write_lmms_data
from transformers import AutoModelForImageTextToText, AutoProcessor

from gpu_pool import messages as msg
from gpu_pool.records import ModelSpec

pytest.importorskip("lmms_eval")

ITERATIONS = 1000
FOLDERS = ("mme", "mmmu")
OPTIONS: dict[str, dict[str, Any]] = {
    "chat": {"tasks": ["mmmu_val", "mme"]},
    "simple": {"tasks": ["mme"], "apply_chat_template": False},
    "limited": {"tasks": ["mmmu_val", "mme"], "limit": 0.5, "gen_kwargs": {"max_new_tokens": 3}},
}
FULL_NAMES = {"mme": "mme", "mmmu_val": "lmms:mmmu_val"}
ASKED = "[{'question': 'Which digit is this?', 'answer': '7'}]"
SAME = ("versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_lmms_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(spec_of: Callable[[Path], ModelSpec]) -> ModelSpec:
    return spec_of(MODEL)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, roots: dict[str, str]) -> dict[str, Any]:
    """What lmms-eval says of each of OPTIONS, made by one process."""
    file = tmp_path_factory.mktemp("lmms-eval") / "results.json"
    options = {name: _their_options(chosen) for name, chosen in OPTIONS.items()}
    request = {"model": str(MODEL), "roots": roots, "folders": FOLDERS, "iterations": ITERATIONS, "options": options}
    script = Path(__file__).with_name("run_lmms_eval.py")
    subprocess.run([sys.executable, str(script), json.dumps(request), str(file)], check=True, capture_output=True)
    return json.loads(file.read_text())


def _their_options(options: dict[str, Any]) -> dict[str, Any]:
    theirs = {key: value for key, value in options.items() if key != "apply_chat_template"}
    if "gen_kwargs" in theirs:
        theirs["gen_kwargs"] = ",".join(f"{key}={value}" for key, value in theirs["gen_kwargs"].items())
    return theirs | {"is_simple": options.get("apply_chat_template") is False}


@pytest.fixture(scope="module")
def run(start_evaluator, worker: Path, roots: dict[str, str]) -> Callable[..., msg.JobDone]:
    """Runs a job."""
    evaluator = start_evaluator(dataset_roots=roots)

    def job(name: str, **options: Any) -> msg.JobDone:
        options = {"bootstrap_iters": ITERATIONS, "use_cache": False, **options, "tasks": tuple(options["tasks"])}
        evaluator.start(name, **options)
        evaluator.attach(name, "real", worker)
        done = evaluator.finish()[-1]
        assert isinstance(done, msg.JobDone), done
        return done

    return job


def samples_of(done: msg.JobDone, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(done.result.samples[task]).read_text().splitlines()]


@pytest.mark.parametrize("name", OPTIONS)
def test_results(references: dict[str, Any], run: Callable[..., msg.JobDone], name: str) -> None:
    expected = references[name]
    done = run(name, **OPTIONS[name] | {"tasks": [f"lmms:{task}" for task in OPTIONS[name]["tasks"]]})
    found = json.loads(Path(done.result.results_path).read_text())
    for task in OPTIONS[name]["tasks"]:
        theirs = [sample["filtered_resps"] for sample in expected["samples"][task]]
        assert [sample["filtered_resps"] for sample in samples_of(done, FULL_NAMES[task])] == theirs
        scores = {key: score for key, score in expected["results"][task].items() if score != []}
        assert found["results"][FULL_NAMES[task]] == pytest.approx(scores, nan_ok=True)
        for key in SAME:
            assert found[key][FULL_NAMES[task]] == expected[key][task], key


def test_what_the_model_says_counts(references: dict[str, Any]) -> None:
    """The comparison above is no comparison of failures."""
    assert references["chat"]["results"]["mme"]["mme_perception_score,none"] > 0
    for style in ("chat", "simple"):
        answers = {str(sample["filtered_resps"]) for sample in references[style]["samples"]["mme"]}
        assert len(answers) > 1


def test_choices_with_images_are_argmax_of_forward_passes(run: Callable[..., msg.JobDone]) -> None:
    done = run("choices", tasks=["seedbench_ppl"])
    samples = samples_of(done, "seedbench_ppl")
    assert len(samples) == DOCUMENTS
    processor: Any = AutoProcessor.from_pretrained(MODEL)
    model: Any = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    right = 0
    for sample, (image, _) in zip(samples, held_out(DOCUMENTS), strict=True):
        doc = sample["doc"]
        choices = [doc[f"choice_{letter}"] for letter in "abcd"]
        prompt = f"<image>{doc['question']} Answer :"
        expected = [logprob(model, processor, image, prompt, f" {choice}") for choice in choices]
        found = [float(pair[0]) for pair in sample["filtered_resps"]]
        assert found == pytest.approx(expected, rel=1e-4)
        right += "ABCD"[max(range(4), key=expected.__getitem__)] == doc["answer"]
    assert done.result.metrics["seedbench_ppl"]["acc,none"] == pytest.approx(right / DOCUMENTS)


def logprob(model: Any, processor: Any, image: Any, prompt: str, continuation: str) -> float:
    """Of the continuation, by one forward pass of its own."""
    start = processor(text=prompt, images=image, return_tensors="pt")["input_ids"].shape[1]
    inputs = processor(text=prompt + continuation, images=image, return_tensors="pt")
    with torch.inference_mode():
        logprobs = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    return sum(float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_one_task_of_both_libraries(run: Callable[..., msg.JobDone]) -> None:
    done = run("both", tasks=["arc_easy", "lmms:arc_easy"], limit=0.75)
    ours, theirs = done.result.metrics["arc_easy"], done.result.metrics["lmms:arc_easy"]
    for metric in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert theirs[metric] == pytest.approx(ours[metric])
    assert len(samples_of(done, "lmms:arc_easy")) == 9


def test_a_bad_image_is_an_error_of_its_document(start_evaluator, worker: Path, tmp_path: Path) -> None:
    roots = write_lmms_data(tmp_path, damaged=(2, 3))
    evaluator = start_evaluator(dataset_roots=roots)
    options = {"tasks": ("mme",), "max_error_share": 0.2, "bootstrap_iters": 0, "use_cache": False}
    evaluator.start("damaged", **options)
    evaluator.attach("damaged", "real", worker)
    done = evaluator.finish()[-1]
    assert isinstance(done, msg.JobDone), done
    errors = [sample.get("evalpool_error") for sample in samples_of(done, "mme")]
    assert [place for place, error in enumerate(errors) if error] == [2, 3]
    assert "image" in errors[2]
    assert "decoded" in errors[3]
    assert done.result.metrics["mme"]["evalpool_errored"] == 2


def test_a_metric_over_pairs_that_lacks_one_of_a_pair_is_missing(start_evaluator, worker: Path, tmp_path: Path) -> None:
    roots = write_lmms_data(tmp_path, damaged=(2, 5))  # of two pairs of what is perceived
    evaluator = start_evaluator(dataset_roots=roots)
    folder = evaluator.start("odd", tasks=("mme",), max_error_share=0.2, bootstrap_iters=0, use_cache=False)
    evaluator.attach("odd", "real", worker)
    messages = evaluator.finish()
    done = messages[-1]
    assert isinstance(done, msg.JobDone), done
    whole = json.loads(Path(done.result.results_path).read_text())["results"]["mme"]
    [of_task] = [message.metrics for message in messages if isinstance(message, msg.TaskDone)]
    for scores in (done.result.metrics["mme"], whole, of_task):
        assert scores["evalpool_missing"] == {
            "mme_perception_score,none": "2 documents are left out: "
            "AssertionError: MME only supports pairwise evaluation"
        }
        assert "mme_perception_score,none" not in scores
        assert scores["mme_cognition_score,none"] >= 0
    assert "mme_perception_score,none has no score" in (folder / "job.log").read_text()


def test_a_bad_image_that_a_task_opens_itself_is_an_error_of_its_document(
    start_evaluator, worker: Path, tmp_path: Path
) -> None:
    files = [image_bytes(image) for image, _ in held_out(DOCUMENTS)]
    files[2], files[3] = files[2][:-40], b"<html>"
    rows = [
        {"id": str(place), "lang": "EN", "qa_pairs": ASKED, "image": {"bytes": file, "path": None}}
        for place, file in enumerate(files)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    evaluator = start_evaluator(dataset_roots={"ByteDance/MTVQA": str(tmp_path)})
    evaluator.start("opened", tasks=("mtvqa",), max_error_share=0.2, bootstrap_iters=0, use_cache=False)
    evaluator.attach("opened", "real", worker)
    done = evaluator.finish()[-1]
    assert isinstance(done, msg.JobDone), done
    errors = [sample.get("evalpool_error") for sample in samples_of(done, "mtvqa")]
    assert [place for place, error in enumerate(errors) if error] == [2, 3]
    assert "truncated" in errors[2]
    assert "UnidentifiedImageError" in errors[3]
    assert done.result.metrics["mtvqa"]["evalpool_errored"] == 2
