"""The results file of a job: lm-eval's fields, and ours under "evalpool"."""

# pyright: basic
from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.loggers.utils import get_commit_from_path, get_git_commit_hash

from gpu_pool.cache import ENGINE_VERSION
from gpu_pool.chunk_messages import Welcome
from gpu_pool.evaluator.api_prompts import TextPrompts
from gpu_pool.evaluator.prompts import PromptEncoder
from gpu_pool.messages import RunJob
from gpu_pool.records import Evaluation, Progress
from gpu_pool.results import hash_text, sanitise_model_name


class Report:
    """Fills in lm-eval's results (`simple_evaluate`, `EvaluationTracker.save_results_aggregated`)."""

    def __init__(self, job: RunJob, encoder: PromptEncoder | TextPrompts) -> None:
        self._job = job
        self._encoder = encoder
        self._start = time.time()

    def complete(
        self,
        results: dict[str, Any],
        task_hashes: dict[str, str],
        progress: Progress,
        welcome: Welcome | None,
        plainly: Sequence[str],
        errors: dict[str, Any],
    ) -> dict[str, Any]:
        """The whole file. `welcome` is None when the cache answered everything; `plainly` says why workers that go
        along the token tree computed some requests the plain way, `errors` what was not answered."""
        end = time.time()
        return {
            **results,
            "config": self._config(welcome),
            **_environment(),
            "date": self._start,
            **self._encoder.description(),
            "task_hashes": task_hashes,
            **self._tracked(),
            "start_time": self._start,
            "end_time": end,
            "total_evaluation_time_seconds": str(end - self._start),
            "evalpool": {**self._ours(progress, welcome), "engine_plain_requests": plainly, "errors": errors},
        }

    def _config(self, welcome: Welcome | None) -> dict[str, Any]:
        evaluation = self._job.evaluation
        args = self._job.model.args
        loaded = {"model_dtype": welcome.dtype} if welcome and welcome.dtype else {}
        return {
            "model": self._job.model.kind,
            "model_args": {"pretrained": args.pretrained, **evaluation.model_args},
            **loaded,
            "model_revision": args.revision or "main",
            **_execution(evaluation),
        }

    def _tracked(self) -> dict[str, Any]:
        """lm-eval's `GeneralConfigTracker`."""
        evaluation = self._job.evaluation
        name = model_name(self._job)
        template = self._encoder.chat_template(evaluation.apply_chat_template)
        template = template if evaluation.apply_chat_template else None
        instruction = evaluation.system_instruction
        return {
            "model_source": self._job.model.kind,
            "model_name": name,
            "model_name_sanitized": sanitise_model_name(name),
            "system_instruction": instruction,
            "system_instruction_sha": hash_text(instruction) if instruction else None,
            "fewshot_as_multiturn": evaluation.fewshot_as_multiturn,
            "chat_template": template,
            "chat_template_sha": hash_text(template) if template else None,
        }

    def _ours(self, progress: Progress, welcome: Welcome | None) -> dict[str, Any]:
        return {
            "engine_version": ENGINE_VERSION,
            "job_id": self._job.job_id,
            "fingerprint": self._job.model.fingerprint,
            "dtype": (welcome and welcome.dtype) or None,
            "attn_implementation": (welcome and welcome.attn_implementation) or None,
            "engine_routes": [{"route": route.route, "reason": route.reason} for route in progress.routes],
            "requests": progress.total,
            "cached_requests": progress.cached,
            "workers": progress.workers,
        }


def model_name(job: RunJob) -> str:
    """The name that lm-eval gives the model in file names: the adapter's, where there is one."""
    return job.model.args.peft or job.model.args.pretrained


def _execution(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "batch_size": evaluation.batch_size,
        "batch_sizes": [],
        "device": evaluation.device,
        "use_cache": evaluation.use_cache,
        "deterministic": evaluation.deterministic,
        "limit": evaluation.limit,
        "bootstrap_iters": evaluation.bootstrap_iters,
        "gen_kwargs": evaluation.gen_kwargs or None,
        "random_seed": evaluation.random_seed,
        "numpy_seed": evaluation.numpy_random_seed,
        "torch_seed": evaluation.torch_random_seed,
        "fewshot_seed": evaluation.fewshot_random_seed,
    }


@functools.cache
def _environment() -> dict[str, Any]:
    return {
        "git_hash": get_git_commit_hash(),
        "transformers_version": version("transformers"),
        "lm_eval_version": version("lm_eval"),
        "upper_git_hash": get_commit_from_path(Path.cwd().parent),
    }
