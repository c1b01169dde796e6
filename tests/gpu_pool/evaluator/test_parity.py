"""Our results are lm-eval's own: the same tasks, model and options through `simple_evaluate` with its HF backend."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_pool import messages as msg
from gpu_pool.records import ModelSpec

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"tasks": ["local_group", "local_cloze", "local_rolling", "local_generation"], "limit": 8},
    "chat": {
        "tasks": ["local_choice", "local_generation"],
        "apply_chat_template": True,
        "system_instruction": "Be brief.",
        "num_fewshot": 1,
        "limit": 0.4,
        "gen_kwargs": {"max_gen_toks": 7},
    },
    "predictions": {"tasks": ["local_choice", "local_generation"], "predict_only": True, "limit": 3},
}
ITERATIONS = 1000
SAME = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
TRACKED = (
    *("git_hash", "transformers_version", "lm_eval_version", "upper_git_hash", "max_length", "eot_token_id"),
    *("tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "task_hashes", "model_source"),
    *("model_name", "model_name_sanitized", "system_instruction", "system_instruction_sha", "fewshot_as_multiturn"),
    *("chat_template", "chat_template_sha"),
)


@pytest.fixture(scope="module", params=["tiny_model", "tiny_t5"])
def model(request: pytest.FixtureRequest, spec_of: Callable[[Path], ModelSpec]) -> ModelSpec:
    """A causal model and an encoder-decoder, in fp32."""
    return spec_of(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, model: ModelSpec, local_tasks: Path) -> Path:
    """A folder for each of OPTIONS with the files of lm-eval's own run, made by one process."""
    folder = tmp_path_factory.mktemp("lm-eval")
    script = Path(__file__).with_name("run_lm_eval.py")
    request = {"model": model.args.pretrained, "tasks": str(local_tasks), "iterations": ITERATIONS, "options": OPTIONS}
    command = [sys.executable, script, json.dumps(request), folder]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def ours(start_evaluator, worker: Path) -> dict[str, msg.JobDone]:
    """The last message of each of OPTIONS' jobs, run one after the other by one evaluator."""
    evaluator = start_evaluator()
    done = {}
    for name, options in OPTIONS.items():
        options = options | {"tasks": tuple(options["tasks"]), "bootstrap_iters": ITERATIONS, "use_cache": False}
        evaluator.start(name, **options)
        evaluator.attach(name, "real", worker)
        done[name] = evaluator.finish()[-1]
        assert isinstance(done[name], msg.JobDone), done[name]
    return done


@pytest.mark.parametrize("name", OPTIONS)
def test_results(references: Path, ours: dict[str, msg.JobDone], name: str) -> None:
    expected = json.loads(next((references / name).rglob("results_*.json")).read_text())
    found = json.loads(Path(ours[name].result.results_path).read_text())
    assert_close({key: found.get(key) for key in SAME}, {key: expected.get(key) for key in SAME})
    assert {key: found[key] for key in TRACKED} == {key: expected[key] for key in TRACKED}
    assert ours[name].result.metrics == found["results"]
    missing = set(expected) - set(found)
    assert missing == {"pretty_env_info"}
    assert set(expected["config"]) - set(found["config"]) <= {"model_num_parameters", "model_sha"}


@pytest.mark.parametrize("name", OPTIONS)
def test_samples(references: Path, ours: dict[str, msg.JobDone], name: str) -> None:
    paths = {path.name.split("_2")[0].removeprefix("samples_"): path for path in (references / name).rglob("*.jsonl")}
    assert set(ours[name].result.samples) == set(paths)
    for task, path in ours[name].result.samples.items():
        assert_close(_lines(Path(path)), _lines(paths[task]))


def test_counts(ours: dict[str, msg.JobDone], model: ModelSpec) -> None:
    progress = ours["plain"].progress
    assert progress.done == progress.total
    assert progress.tasks["local_generation"].total == 16
    assert set(progress.workers) == {"real"}


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Equal, but for the last digits of numbers (and of numbers written as strings)."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{where}[{i}]")
    elif (number := _number(expected)) is not None:
        # sums of log-probabilities: relative to max(1, |x|); perplexities and their errors are exponents of these
        assert _number(found) == pytest.approx(number, rel=2e-5, abs=1e-5), where
    else:
        assert found == expected, where


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
