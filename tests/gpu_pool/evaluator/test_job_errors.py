"""A request's error and another worker's answers at the same time."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import datasets
import pytest
from fake_worker import FakeWorker, failing

from gpu_pool import messages as msg
from gpu_pool.evaluator.catalogue import TaskLibrary
from gpu_pool.evaluator.failures import JobError
from gpu_pool.evaluator.job import JobRun, Workshop
from gpu_pool.records import Evaluation, ModelSpec


def test_an_error_counts_before_its_task_can_be_complete(
    data_dir: Path, model: ModelSpec, local_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slow: while the error is logged, another worker answers all else."""
    being_logged, ended = threading.Event(), threading.Event()

    def log_slowly(record: logging.LogRecord) -> bool:
        if "ended in an error" in record.msg:
            being_logged.set()
            ended.wait()
        return True

    def attach_another() -> None:
        being_logged.wait()
        run.dispatcher.attach("good", str(good.address))

    evaluation = Evaluation(model=model.args.pretrained, tasks=("local_choice",), use_cache=False, limit=2)
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)  # a library redirects it
    library = TaskLibrary(data_dir, (str(local_tasks),), {}, False)
    job = msg.RunJob(job_id="j", evaluation=evaluation, model=model, output_dir=str(tmp_path), log_path=os.devnull)
    run = JobRun(job, lambda message: None, Workshop(library, data_dir, allow_code=False))
    bad, good = FakeWorker("bad", tmp_path / "bad", failing), FakeWorker("good", tmp_path / "good")
    helper = threading.Thread(target=attach_another)
    helper.start()
    logger = logging.getLogger("gpu_pool.evaluator.job")
    logger.addFilter(log_slowly)
    try:
        run.dispatcher.attach("bad", str(bad.address))
        with pytest.raises(JobError, match=r"1 of 6 requests( so far)? ended in an error"):
            run.execute()
    finally:
        being_logged.set()
        ended.set()
        helper.join()
        logger.removeFilter(log_slowly)
        bad.close()
        good.close()
