"""One job from RunJob to JobDone: tasks are built, asked, scored and published one by one, as they complete."""

# pyright: basic
from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_pool.cache import ResponseCache
from gpu_pool.evaluator import harness_lm_eval as harness
from gpu_pool.evaluator.catalogue import TaskLibrary
from gpu_pool.evaluator.dispatch import Dispatcher
from gpu_pool.evaluator.failures import ContentChanged, JobError, explain
from gpu_pool.evaluator.progress import ProgressReporter
from gpu_pool.evaluator.prompts import EncoderPool, PromptEncoder
from gpu_pool.evaluator.report import Report, model_name
from gpu_pool.evaluator.requests import RequestBuilder, TaskRequests, Unit
from gpu_pool.messages import JobDone, Message, RunJob, TaskDone
from gpu_pool.records import JobResult, Phase
from gpu_pool.results import ResultFiles, plain_metrics, samples_hash

_log = logging.getLogger(__name__)


class Workshop:
    """What an evaluator keeps warm for all its jobs."""

    def __init__(self, library: TaskLibrary, data_dir: Path, *, allow_code: bool) -> None:
        self.library = library
        self.cache = ResponseCache(data_dir / "cache" / "responses.sqlite")
        self.encoders = EncoderPool(data_dir / "fingerprints.json")
        self.allow_code = allow_code


class JobRun:
    """One job. `execute` runs in the main thread; workers come, answer and go in their own."""

    def __init__(self, job: RunJob, send: Callable[[Message], None], workshop: Workshop) -> None:
        self._job = job
        self._evaluation = job.evaluation
        self._workshop = workshop
        self._send = send
        self._progress = ProgressReporter(job.job_id, send)
        batch_size = None if job.evaluation.batch_size == "auto" else job.evaluation.batch_size
        self.dispatcher = Dispatcher(job.job_id, batch_size, self._on_answers, self._on_failure)
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        """Answers that each task still waits for."""
        self._ready: queue.SimpleQueue[str | JobError] = queue.SimpleQueue()
        """Tasks that have all their answers, and failures."""
        self._requests: dict[str, TaskRequests] = {}
        self._scores: dict[str, harness.TaskScore] = {}
        self._hashes: dict[str, str] = {}
        self._samples: dict[str, str] = {}
        self._is_current = True
        """Whether the files still are the model that the job means. If not, the job ends when a replica that was loaded
        before answers; where one has to be loaded, that fails first, and the server starts the job anew."""

    def execute(self) -> JobDone:
        """Evaluate.

        Raises:
            PoolError: the job cannot be completed, and why.
        """
        with self._progress, contextlib.closing(self.dispatcher):
            harness.seed_everything(self._evaluation)
            encoder, self._is_current = self._workshop.encoders.get(self._job.model)
            report = Report(self._job, encoder)
            files = ResultFiles(Path(self._job.output_dir), model_name(self._job))
            loaded = self._workshop.library.load(self._evaluation.tasks)
            tasks: dict[str, Any] = loaded["tasks"]
            self._progress.expect(tasks)
            self._ask_all(tasks, encoder, files)
            while len(self._scores) < len(tasks):
                self._publish_next(tasks, files)
            self._progress.enter(Phase.SCORING)
            return self._finish(tasks, loaded.get("groups", {}), report, files)

    def _ask_all(self, tasks: Mapping[str, Any], encoder: PromptEncoder, files: ResultFiles) -> None:
        """Build and queue every task's requests, publishing meanwhile what is complete."""
        for name, task in tasks.items():
            with _blame(name):
                harness.configure_task(name, task, self._evaluation, self._workshop.allow_code)
        builder = RequestBuilder(self._job.model, encoder, self._evaluation.torch_random_seed)
        template = self._chat_template(encoder)
        for name, task in tasks.items():
            with _blame(name):
                instances = harness.build_instances(task, self._evaluation, template)
                self._ask(name, builder.build(name, instances))
            self._progress.enter(Phase.EVALUATING)
            while not self._ready.empty():
                self._publish_next(tasks, files)

    def _chat_template(self, encoder: PromptEncoder) -> harness.ChatTemplate | None:
        wanted = self._evaluation.apply_chat_template
        return functools.partial(encoder.apply_chat_template, wanted) if wanted else None

    def _ask(self, name: str, requests: TaskRequests) -> None:
        """Queue what neither the cache nor an earlier request of the job answers."""
        uses = Counter(requests.units())
        new = [unit for unit in uses if not unit.asked]
        cached = sum(uses[unit] for unit in self._answer_from_cache(new))
        with self._lock:
            waiting = [unit for unit in uses if unit.answer is None]
            for unit in waiting:
                unit.waiting[name] += uses[unit]
            missing = self._open[name] = sum(uses[unit] for unit in waiting)
            self._requests[name] = requests
        self._progress.built(name, uses.total())
        self._progress.known(name, cached=cached, repeated=uses.total() - missing - cached)
        if not missing:
            self._ready.put(name)
        misses = [unit for unit in new if unit.answer is None]
        misses.sort(key=lambda unit: unit.prompt + unit.continuation)  # equal beginnings side by side
        for unit in misses:
            unit.asked = True
        self.dispatcher.submit(misses)
        tokens = sum(unit.cost for unit in misses)
        _log.info("%s: %d requests, %d cached; asking %d (%d tokens)", name, uses.total(), cached, len(misses), tokens)

    def _answer_from_cache(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that the cache answers."""
        keys = [unit.key for unit in units if unit.key] if self._evaluation.use_cache else []
        known = self._workshop.cache.lookup(keys)
        for unit in units:
            unit.answer = known.get(unit.key) if unit.key else None
        return [unit for unit in units if unit.answer is not None]

    def _on_answers(self, worker_id: str, units: Sequence[Unit]) -> None:
        if self._evaluation.use_cache:
            self._workshop.cache.store(
                {unit.key: unit.answer for unit in units if unit.key and unit.answer is not None}
            )
        counts: Counter[str] = Counter()
        with self._lock:
            for unit in units:
                counts.update(unit.waiting)
                unit.waiting.clear()
                unit.forget_tokens()
            for task in counts:
                self._open[task] -= counts[task]
            complete = [task for task in counts if not self._open[task]]
        self._progress.answered(counts, worker_id)
        for task in complete:
            self._ready.put(task)

    def _on_failure(self, error: str, units: Sequence[Unit]) -> None:
        with self._lock:
            tasks = sorted({task for unit in units for task in unit.waiting})
        self._ready.put(JobError(f"{', '.join(tasks)}: {error}" if tasks else error))

    def _publish_next(self, tasks: Mapping[str, Any], files: ResultFiles) -> None:
        """Wait for a task's last answer, score it and write its samples."""
        name = self._ready.get()
        if isinstance(name, JobError):
            raise name
        if not self._is_current:
            raise ContentChanged(f"{self._job.model.args.pretrained} has changed since the job was submitted")
        task = tasks[name]
        with _blame(name):
            self._requests.pop(name).deliver()
            score = harness.score_task(name, task, self._evaluation)
            if score.samples is not None:
                self._samples[name] = str(files.write_samples(name, score.samples))
                self._hashes[name] = samples_hash(score.samples)
                score.samples = None
        harness.release(task)
        self._scores[name] = score
        metrics = plain_metrics(score.metrics)
        _log.info("%s: %s", name, metrics)
        self._send(TaskDone(job_id=self._job.job_id, task=name, metrics=metrics, samples_path=self._samples.get(name)))

    def _finish(
        self, tasks: Mapping[str, Any], groups: Mapping[str, Any], report: Report, files: ResultFiles
    ) -> JobDone:
        results = harness.combine_scores((self._scores[name] for name in tasks), groups)
        metrics = {name: plain_metrics(values) for name, values in results["results"].items()}
        for name in groups:
            if name in metrics:
                self._send(TaskDone(job_id=self._job.job_id, task=name, metrics=metrics[name]))
        progress = self._progress.current
        whole = report.complete(
            results,
            {name: self._hashes[name] for name in tasks if name in self._hashes},
            progress,
            self.dispatcher.welcome,
        )
        path = files.write_results(whole)
        _log.info(
            "done: %d requests, %d cached, by workers %s; %s", progress.total, progress.cached, progress.workers, path
        )
        result = JobResult(
            model_name=files.model_name,
            results_path=str(path),
            samples={name: self._samples[name] for name in tasks if name in self._samples},
            metrics=metrics,
        )
        return JobDone(job_id=self._job.job_id, result=result, progress=progress)


@contextlib.contextmanager
def _blame(task: str) -> Generator[None]:
    """Name the task in what goes wrong with it."""
    try:
        yield
    except Exception as error:
        raise JobError(f"{task}: {explain(error)}") from error
