"""One job from RunJob to JobDone: tasks are built, asked, scored and published one by one, as they complete."""

# pyright: basic
from __future__ import annotations

import contextlib
import functools
import json
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_pool.cache import CachedModel, ResponseCache, cache_path
from gpu_pool.evaluator.api_prompts import TextPrompts, api_prompts
from gpu_pool.evaluator.catalogue import TaskLibrary
from gpu_pool.evaluator.chunking import Paces
from gpu_pool.evaluator.disk_room import DiskRoom
from gpu_pool.evaluator.dispatch import Dispatcher
from gpu_pool.evaluator.errored import Errored
from gpu_pool.evaluator.failures import ContentChanged, JobError, explain
from gpu_pool.evaluator.harness import combine, harness_of
from gpu_pool.evaluator.harness_lm_eval import ChatTemplate, portions, seed_everything
from gpu_pool.evaluator.media_files import MediaFiles
from gpu_pool.evaluator.media_prompts import MediaPrompts
from gpu_pool.evaluator.missing_scores import without_missing
from gpu_pool.evaluator.progress import ProgressReporter
from gpu_pool.evaluator.prompts import EncoderPool, PromptEncoder
from gpu_pool.evaluator.report import Report, model_name
from gpu_pool.evaluator.requests import RequestBuilder, TaskRequests, Unit
from gpu_pool.evaluator.scores import TaskScore
from gpu_pool.evaluator.shared_answers import SharedAnswers
from gpu_pool.fingerprint import memo_path
from gpu_pool.messages import AwaitingWorker, JobDone, Message, RunJob, TaskDone, WorkerUnreachable
from gpu_pool.records import DEFAULT_CACHE_MAX_BYTES, JobResult, Phase
from gpu_pool.results import ResultFiles, plain_metrics, samples_hash

_ERRORED = "%s: ended in an error: %s"

_log = logging.getLogger(__name__)


class Workshop:
    """What an evaluator keeps warm for all its jobs."""

    def __init__(
        self, library: TaskLibrary, data_dir: Path, *, allow_code: bool, cache_max_bytes: int = DEFAULT_CACHE_MAX_BYTES
    ) -> None:
        self.library = library
        self.cache = ResponseCache(cache_path(data_dir), cache_max_bytes)
        self.encoders = EncoderPool(memo_path(data_dir))
        self.paces = Paces()
        self.allow_code = allow_code
        self.media_dir = data_dir / "cache"


class JobRun:
    """One job. `execute` runs in the main thread; workers come, answer and go in their own."""

    def __init__(self, job: RunJob, send: Callable[[Message], None], workshop: Workshop) -> None:
        self._job = job
        self._evaluation = job.evaluation
        self._workshop = workshop
        self._send = send
        self._progress = ProgressReporter(job.job_id, send)
        self._room = DiskRoom(self._progress.waits_for)
        self._media = MediaFiles(workshop.media_dir, self._room)
        batch_size = None if job.evaluation.batch_size == "auto" else job.evaluation.batch_size
        self.dispatcher = Dispatcher(
            job.job_id,
            batch_size,
            self._on_answers,
            self._on_errors,
            self._on_failure,
            self._on_silence,
            workshop.paces,
            self._media.read,
            deterministic=job.evaluation.deterministic,
            api=job.model.api,
            on_route=self._progress.routed,
            on_unreachable=self._on_unreachable,
        )
        self._shared: SharedAnswers | None = None
        if job.evaluation.use_cache and (job.model.api is None or job.model.api.is_cached):
            model = CachedModel(job.model.fingerprint, job.model.args.pretrained)
            self._shared = SharedAnswers(
                workshop.cache, model, self._on_shared, self.dispatcher.submit, self._on_failure
            )
            self.dispatcher.shared = self._shared
        self._computed_before = workshop.paces.computed()
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        """Answers that each task still waits for, and one more until all of its requests are known."""
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Tasks that have all their answers; None where the job has failed."""
        self._failure: JobError | None = None
        self._errored = Errored(job.evaluation.max_error_share)
        self._is_all_asked = False
        self._requests: dict[str, TaskRequests] = {}
        self._scores: dict[str, TaskScore] = {}
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
        with self._progress, contextlib.closing(self._media), self._sharing(), contextlib.closing(self.dispatcher):
            seed_everything(self._evaluation)
            encoder = self._encoder()
            report = Report(self._job, encoder)
            files = ResultFiles(Path(self._job.output_dir), model_name(self._job), self._job.submitted_at)
            loaded = self._workshop.library.load(self._evaluation.tasks, self._evaluation.model)
            tasks: dict[str, Any] = loaded["tasks"]
            self._progress.expect(tasks)
            self._ask_all(tasks, encoder, files)
            while len(self._scores) < len(tasks):
                self._publish_next(tasks, files)
            self._check_failure()
            self._progress.enter(Phase.SCORING)
            return self._finish(tasks, loaded.get("groups", {}), report, files)

    def _encoder(self) -> PromptEncoder | TextPrompts:
        if self._job.model.api is not None:
            return api_prompts(self._job.model)
        encoder, self._is_current = self._workshop.encoders.get(self._job.model)
        return encoder

    @contextlib.contextmanager
    def _sharing(self) -> Generator[None]:
        try:
            yield
        finally:
            if self._shared:
                self._shared.close()

    def _ask_all(self, tasks: Mapping[str, Any], encoder: PromptEncoder | TextPrompts, files: ResultFiles) -> None:
        """Build and queue every task's requests, publishing meanwhile what is complete."""
        for name, task in tasks.items():
            with _blame(name):
                harness_of(task).configure_task(
                    name,
                    task,
                    self._evaluation,
                    self._workshop.allow_code,
                    modalities=encoder.modalities,
                    output_dir=self._job.output_dir,
                    max_images=encoder.max_images,
                )
        builder = RequestBuilder(
            self._job.model,
            encoder,
            self._evaluation.torch_random_seed,
            MediaPrompts(self._media, encoder),
            deterministic=self._evaluation.deterministic,
        )
        for number, (name, task) in enumerate(tasks.items()):
            sizes = portions(is_first=number == 0)
            with _blame(name):
                self._open[name] = 1  # for what is not built yet
                template = self._chat_template(task, encoder)
                folders = getattr(task, "media_folders", ())
                for instances in harness_of(task).build_instances(task, self._evaluation, template, sizes):
                    self._ask(name, builder.build(instances, folders, is_chat=template is not None))
                    self._progress.enter(Phase.EVALUATING)
                    if self._failure:
                        break
                self._all_asked(name)
            while not self._ready.empty():
                self._publish_next(tasks, files)
        self._is_all_asked = True
        self._judge_errors()

    def _chat_template(self, task: Any, encoder: PromptEncoder | TextPrompts) -> ChatTemplate | None:
        has_template = encoder.has_chat_template
        wanted = harness_of(task).wanted_template(task, self._evaluation, has_template=has_template)
        if not wanted:
            return None
        keep_system = bool(self._evaluation.system_instruction)  # the task's description goes with it
        return functools.partial(encoder.apply_chat_template, wanted, keep_system=keep_system)

    def _ask(self, name: str, requests: TaskRequests) -> None:
        """Queue those of a task's requests that neither the cache nor an earlier request of the job answers."""
        uses = Counter(requests.units())
        new = [unit for unit in uses if not unit.asked]
        cached = sum(uses[unit] for unit in self._answer_from_cache(new))
        with self._lock:
            waiting = [unit for unit in uses if unit.is_open]
            for unit in waiting:
                unit.waiting[name] += uses[unit]
            missing = sum(uses[unit] for unit in waiting)
            self._open[name] += missing
            ended = uses.keys() - waiting  # one that waits is counted when it ends, even if it has an error already
            errored = [unit for unit in ended if unit.error is not None]
        self._requests.setdefault(name, TaskRequests()).responses.extend(requests.responses)
        self._progress.built(name, uses.total())
        without = sum(uses[unit] for unit in errored)
        self._progress.known(name, cached=cached, repeated=uses.total() - missing - cached - without)
        for unit in errored:
            self._count_errors({name: uses[unit]}, unit.error or "")
            _log.warning(_ERRORED, name, unit.error)
        misses = [unit for unit in new if unit.is_open]
        for unit in misses:
            unit.asked = True
        self.dispatcher.submit(misses, group=name)
        tokens = sum(unit.cost for unit in misses)
        _log.info("%s: %d requests, %d cached; asking %d (%d tokens)", name, uses.total(), cached, len(misses), tokens)

    def _all_asked(self, name: str) -> None:
        """No further request of the task follows."""
        with self._lock:
            self._open[name] -= 1
            complete = not self._open[name]
        if complete:
            self._ready.put(name)

    def _answer_from_cache(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that the cache answers."""
        return self._shared.known(units) if self._shared else []

    def _on_answers(self, worker_id: str, units: Sequence[Unit]) -> None:
        """A worker has answered these."""
        if self._shared:
            self._shared.keep(units)
        counts, complete = self._settle(units)
        self._progress.answered(counts, worker_id)
        for task in complete:
            self._ready.put(task)

    def _on_errors(self, units: Sequence[Unit]) -> None:
        for unit in units:
            counts, complete = self._settle([unit], error=unit.error or "")
            _log.warning(_ERRORED, ", ".join(counts), unit.error)
            for task in complete:
                self._ready.put(task)

    def _on_shared(self, units: Sequence[Unit]) -> None:
        """Another job has answered these."""
        counts, complete = self._settle(units)
        for task, count in counts.items():
            self._progress.known(task, cached=count, repeated=0)
        for task in complete:
            self._ready.put(task)

    def _settle(self, units: Sequence[Unit], error: str | None = None) -> tuple[Counter[str], list[str]]:
        """Nobody waits for these any more: how many each task had waited for, and the tasks that are complete.

        `error`: why they have no answer. It counts before another thread's answers can make a task complete.
        """
        counts: Counter[str] = Counter()
        with self._lock:
            for unit in units:
                counts.update(unit.waiting)
                unit.waiting.clear()
                unit.forget_tokens()
            if error is not None:
                self._count_errors(counts, error)
            for task in counts:
                self._open[task] -= counts[task]
            return counts, [task for task in counts if not self._open[task]]

    def _count_errors(self, counts: Mapping[str, int], cause: str) -> None:
        self._errored.add(counts, cause)
        self._progress.errored(counts)
        self._judge_errors()

    def _judge_errors(self) -> None:
        """Let the job fail once it is certain that too many requests ended in an error."""
        if error := self._errored.too_many(self._progress.current.total, is_final=self._is_all_asked):
            self._on_failure(f"{', '.join(sorted(self._errored.by_task))}: {error}")

    def _on_failure(self, error: str) -> None:
        self._failure = self._failure or JobError(error)
        self._ready.put(None)

    def _check_failure(self) -> None:
        if self._failure:
            raise self._failure

    def _on_silence(self, worker_id: str) -> None:
        self._send(AwaitingWorker(job_id=self._job.job_id, worker_id=worker_id))

    def _on_unreachable(self, worker_id: str, error: str) -> None:
        self._send(WorkerUnreachable(job_id=self._job.job_id, worker_id=worker_id, error=error))

    def _publish_next(self, tasks: Mapping[str, Any], files: ResultFiles) -> None:
        """Wait for a task's last answer, score it and write its samples."""
        name = self._ready.get()
        self._check_failure()
        assert name is not None, "a failure has no reason"
        if not self._is_current:
            raise ContentChanged(f"{self._job.model.args.pretrained} has changed since the job was submitted")
        _log.info("%s: answered", name)
        task = tasks[name]
        with _blame(name):
            errored = self._requests.pop(name).deliver()
            score = harness_of(task).score_task(name, task, self._evaluation, errored)
            if (samples := score.samples) is not None:
                self._samples[name] = str(self._room.wait(lambda: files.write_samples(name, samples)))
                self._hashes[name] = samples_hash(samples)
                score.samples = None
        harness_of(task).release(task)
        self._scores[name] = score
        for metric, why in score.missing.items():
            _log.warning("%s: %s has no score: %s", name, metric, why)
        [metrics] = self._told({name: plain_metrics(score.metrics)}, {}).values()
        _log.info("%s: %s", name, metrics)
        self._send(TaskDone(job_id=self._job.job_id, task=name, metrics=metrics, samples_path=self._samples.get(name)))

    def _told(
        self, metrics: Mapping[str, Mapping[str, Any]], subtasks: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, Any]]:
        """Scores of tasks and groups with what went wrong beside them."""
        missing = {name: score.missing for name, score in self._scores.items() if score.missing}
        return self._errored.beside(without_missing(metrics, missing, subtasks), subtasks)

    def _computed(self) -> dict[str, tuple[int, float]]:
        """Chunks of this job that each worker computed, and the seconds of its time in them."""
        computed: dict[str, tuple[int, float]] = {}
        for worker_id, (chunks, seconds) in self._workshop.paces.computed().items():
            chunks_before, seconds_before = self._computed_before.get(worker_id, (0, 0.0))
            if chunks > chunks_before:
                computed[worker_id] = chunks - chunks_before, round(seconds - seconds_before, 4)
        return computed

    def _finish(
        self, tasks: Mapping[str, Any], groups: Mapping[str, Any], report: Report, files: ResultFiles
    ) -> JobDone:
        results = combine(tasks, self._scores, groups)
        for scores in ("results", "groups"):
            if scores in results:
                results[scores] = self._told(results[scores], results["group_subtasks"])
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
            self.dispatcher.plainly,
            self._errored.report(
                {name: progress.tasks[name].total for name in tasks},
                {name: self._scores[name].excluded for name in tasks},
            ),
        )
        path = self._room.wait(lambda: files.write_results(whole))
        _log.info("computed: %s", json.dumps(self._computed()))  # scripts/record_trace.py reads it
        _log.info(
            "done: %d requests, %d cached, by workers %s; %s", progress.total, progress.cached, progress.workers, path
        )
        result = JobResult(
            model_name=files.model_name,
            results_path=str(path),
            samples={name: self._samples[name] for name in tasks if name in self._samples},
            metrics=metrics,
            errored=self._errored.by_task,
        )
        return JobDone(job_id=self._job.job_id, result=result, progress=progress)


@contextlib.contextmanager
def _blame(task: str) -> Generator[None]:
    """Name the task in what goes wrong with it."""
    try:
        yield
    except Exception as error:
        raise JobError(f"{task}: {explain(error)}") from error
