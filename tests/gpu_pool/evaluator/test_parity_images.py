"""Prompts with images are continued as by lm-eval's `hf-multimodal` backend: the same model, tasks and options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digits import GENERATION, MODEL, QUESTION, held_out, image_bytes, write_documents, write_task

from gpu_pool import messages as msg
from gpu_pool.records import ModelSpec

DOCUMENTS = 16
CHAT = {"apply_chat_template": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "chat": CHAT | {"tasks": ["digits", "pairs"]},
    "system": CHAT | {"tasks": ["pairs"], "system_instruction": "Look twice."},
    "plain": {"tasks": ["digits", "pairs"]},
}
PAIRS = GENERATION | {"doc_to_text": "First <image>, then <image>: {{question}}", "doc_to_image": ["image", "other"]}


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`digits` with one image each, `pairs` with two, among text; of several sizes."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    pairs = held_out(DOCUMENTS)
    sizes = [(32, 32), (48, 40), (32, 64), (90, 50)]
    files = [image_bytes(image.resize(sizes[place % 4])) for place, (image, _) in enumerate(pairs)]
    digits = [digit for _, digit in pairs]
    data = folder / "digits.parquet"
    write_documents(data, files, digits, [QUESTION] * len(pairs))
    write_task(folder, "digits", data, GENERATION)
    both = datasets.Dataset.from_parquet(str(data), cache_dir=str(folder / "cache"))
    others = [{"bytes": file, "path": None} for file in reversed(files)]
    both = both.remove_columns("question").add_column("question", ["Which digits are these?"] * len(pairs))
    both = both.add_column("other", others).cast_column("other", datasets.Image())
    both.to_parquet(folder / "pairs.parquet")
    write_task(folder, "pairs", folder / "pairs.parquet", PAIRS)
    return folder


@pytest.fixture(scope="module", params=["digits", "llava", "gemma3"])
def model(
    request: pytest.FixtureRequest, spec_of: Callable[[Path], ModelSpec], tiny_vlm: Callable[[str], Path]
) -> ModelSpec:
    """One that reads digits, and random ones of other families."""
    return spec_of(MODEL if request.param == "digits" else tiny_vlm(request.param))


@pytest.fixture(scope="module")
def options(model: ModelSpec) -> dict[str, dict[str, Any]]:
    """Without a chat template lm-eval gives Gemma's processor a string that it does not look for."""
    lacking = {"plain"} if "gemma3" in model.args.pretrained else set()
    return {name: chosen for name, chosen in OPTIONS.items() if name not in lacking}


@pytest.fixture(scope="module")
def references(
    tmp_path_factory: pytest.TempPathFactory, model: ModelSpec, local_tasks: Path, options: dict[str, dict[str, Any]]
) -> Path:
    """A folder for each of the options with the files of lm-eval's own run."""
    folder = tmp_path_factory.mktemp("lm-eval")
    script = Path(__file__).with_name("run_lm_eval.py")
    request = {"model": model.args.pretrained, "backend": "hf-multimodal", "tasks": str(local_tasks), "iterations": 10}
    command = [sys.executable, script, json.dumps(request | {"options": options}), folder]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def ours(start_evaluator, worker: Path, options: dict[str, dict[str, Any]]) -> dict[str, msg.JobDone]:
    """The last message of the job of each of the options."""
    evaluator = start_evaluator()
    done = {}
    for name, chosen in options.items():
        chosen = chosen | {"tasks": tuple(chosen["tasks"]), "bootstrap_iters": 10, "use_cache": False}
        evaluator.start(name, **chosen)
        evaluator.attach(name, "real", worker)
        done[name] = evaluator.finish()[-1]
        assert isinstance(done[name], msg.JobDone), done[name]
    return done


def test_results(references: Path, ours: dict[str, msg.JobDone]) -> None:
    for name, done in ours.items():
        expected = json.loads(next((references / name).rglob("results_*.json")).read_text())
        found = json.loads(Path(done.result.results_path).read_text())
        assert found["results"] == expected["results"]
        for key in ("configs", "versions", "n-shot", "n-samples", "chat_template_sha", "max_length"):
            assert found[key] == expected[key], key


def test_samples(references: Path, ours: dict[str, msg.JobDone]) -> None:
    for name, done in ours.items():
        for task, path in done.result.samples.items():
            found = [json.loads(line) for line in Path(path).read_text().splitlines()]
            [other] = (references / name).rglob(f"samples_{task}_*.jsonl")
            expected = [json.loads(line) for line in other.read_text().splitlines()]
            for mine, theirs in zip(found, expected, strict=True):
                assert mine["arguments"]["gen_args_0"]["arg_0"] == theirs["arguments"]["gen_args_0"]["arg_0"]
                for key in ("doc_id", "target", "resps", "filtered_resps", "prompt_hash", "target_hash", "exact_match"):
                    assert mine[key] == theirs[key], (name, task, key)
