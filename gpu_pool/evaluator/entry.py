"""Where an evaluator process begins. The server imports this file: heavy imports stay inside the functions."""

from __future__ import annotations

import gc
import logging
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_pool.child import enter_child
from gpu_pool.evaluator.loop import EvaluatorLoop, OpenJob
from gpu_pool.messages import EvaluatorStart

if TYPE_CHECKING:
    from gpu_pool.evaluator.catalogue import TaskLibrary


def evaluator_main(connection: Connection[Any, Any], start: EvaluatorStart, parent_pid: int) -> None:
    """Spawn target: import the harness, index its tasks, then serve the control pipe until it closes."""
    enter_child(parent_pid, start.log_path)
    _set_environment(start)
    _log_to_stderr()
    loop = EvaluatorLoop(connection, start)
    loop.watch()
    _serve(loop, start)


def _set_environment(start: EvaluatorStart) -> None:
    """What libraries read when they are imported."""
    threads = str(max(1, min(8, (os.cpu_count() or 1) // 4)))
    os.environ.update(
        DISABLE_MULTIPROC="1",  # lm-eval would fork a pool to bootstrap
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="passive",
        TOKENIZERS_PARALLELISM="true",
        RAYON_NUM_THREADS=threads,  # tokenising shares the machine with CPU workers
        TQDM_DISABLE="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        CUDA_VISIBLE_DEVICES="",  # GPUs are the workers'
    )
    if start.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    for name in ("gpu_pool", "lm_eval"):
        logging.getLogger(name).setLevel(logging.INFO)


def _serve(loop: EvaluatorLoop, start: EvaluatorStart) -> None:
    from gpu_pool.evaluator.catalogue import TaskLibrary

    library = TaskLibrary(
        Path(start.data_dir),
        start.include_paths,
        start.dataset_roots,
        start.allow_code_execution,
        allow_judges=start.allow_judges,
    )
    open_job = _prepare_for_jobs(start, library) if start.runs_jobs else None
    settle_memory()
    loop.serve(library, open_job)


def settle_memory() -> None:
    """Keep the garbage collector from what stays: all that was imported, and a job's many small objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _prepare_for_jobs(start: EvaluatorStart, library: TaskLibrary) -> OpenJob:
    """Import all that a job needs, so that no job waits for it."""
    from functools import partial

    from gpu_pool.evaluator import bootstrap
    from gpu_pool.evaluator.harness_lm_eval import memoise_templates
    from gpu_pool.evaluator.images import leave_undecoded
    from gpu_pool.evaluator.job import JobRun, Workshop
    from gpu_pool.evaluator.prompts import import_model_code
    from gpu_pool.evaluator.sounds import leave_sounds_undecoded

    memoise_templates()
    bootstrap.install()
    leave_undecoded()
    leave_sounds_undecoded()
    import_model_code()
    workshop = Workshop(
        library,
        Path(start.data_dir),
        allow_code=start.allow_code_execution,
        cache_max_bytes=start.cache_max_bytes,
    )
    return partial(JobRun, workshop=workshop)
