"""lm-eval's own steps, one task at a time: what `simple_evaluate` and `evaluate` do, without their model call.

Sources: `lm_eval/evaluator.py` and `lm_eval/evaluator_utils.py` 0.4.13. Tasks, prompts, filters, metrics and
aggregation are the harness's; only the order of the steps is ours, so that a task can be published while others run.
"""

# pyright: basic
from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from typing import Any

import lm_eval.utils
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import EvalAcc, _collect_results, aggregate_groups, get_sample_size

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.images import described, had_or_problem
from gpu_pool.evaluator.lazy_task import LazyTask
from gpu_pool.evaluator.missing_scores import Values, aggregated
from gpu_pool.evaluator.scores import TaskScore
from gpu_pool.gen_kwargs import with_request
from gpu_pool.records import TEXT_ONLY, Evaluation, Modality
from gpu_pool.results import hash_text, plain

ChatTemplate = Callable[..., str]

FIRST_PORTION, PORTION = 32, 512
"""Documents whose prompts are built before workers get them: few while they have nothing to do, then twice as many each
time. Those with equal beginnings come together as far as they still wait, and what waits is put in order anew no more
often than it doubles."""

_SHOWING = ("doc_to_image", "doc_to_audio", "doc_to_video")
"""Methods of a task that give what a document shows: files, or what the task's own code makes of them."""

_log = logging.getLogger(__name__)


class TaskError(PoolError):
    """A task cannot be run here."""


def memoise_templates() -> None:
    """Compile each Jinja template once: lm-eval does it for every document and every shot."""
    environment: Any = lm_eval.utils.env
    environment.from_string = functools.lru_cache(maxsize=4096)(environment.from_string)


def seed_everything(evaluation: Evaluation) -> None:
    """Seed Python and numpy as `simple_evaluate` does. (torch runs in the workers, where each request has a seed.)"""
    if evaluation.random_seed is not None:
        random.seed(evaluation.random_seed)
    if evaluation.numpy_random_seed is not None:
        np.random.seed(evaluation.numpy_random_seed)


def configure_task(
    name: str,
    task: Task,
    evaluation: Evaluation,
    allow_code: bool,
    *,
    modalities: Set[Modality] = TEXT_ONLY,
    output_dir: str | None = None,
    max_images: int | None = None,
) -> None:
    """Apply the request's overrides to one task, none of which writes files of its own.

    Raises:
        TaskError: the task runs code written by the model, or shows what the model does not read.
    """
    if getattr(task, "UNSAFE_CODE", False) and not allow_code:
        raise TaskError(f"{name} runs code written by the model, which the operator of this server does not allow")
    for kind in sorted(_shown(task) - modalities):
        raise TaskError(f"{name} needs a model that takes {kind}")
    if task.get_config("output_type") == "generate_until":
        if evaluation.gen_kwargs:
            options = with_request(task.get_config("generation_kwargs"), evaluation.gen_kwargs)
            task.set_config(key="generation_kwargs", value=options)
        _log.info("%s: generation_kwargs %s", name, task.get_config("generation_kwargs"))
    if evaluation.predict_only:
        task.override_metric(metric_name="bypass")
    set_fewshots(name, task, evaluation)
    if isinstance(task, LazyTask):
        task.max_images = max_images


def _shown(task: Any) -> set[Modality]:
    """What a task's documents show."""
    kinds: tuple[Modality, ...] = ("image", "audio")
    shown: set[Modality] = {kind for kind in kinds if task.get_config(f"doc_to_{kind}")}
    if getattr(task, "shows_videos", False):
        shown.add("video")
    if "audio" not in shown:
        shown.add("text")
    return shown


def set_fewshots(name: str, task: Any, evaluation: Evaluation) -> None:
    """A task that says 0 keeps 0; the seed is set whoever says the number."""
    default = task.get_config("num_fewshot")
    if evaluation.num_fewshot is not None and default != 0:
        task.set_config(key="num_fewshot", value=evaluation.num_fewshot)
        _log.info("%s: num_fewshot %s instead of %s", name, evaluation.num_fewshot, default)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=evaluation.fewshot_random_seed)


def wanted_template(task: Task, evaluation: Evaluation, *, has_template: bool) -> bool | str:
    """None unless the request says so, as in lm-eval."""
    return evaluation.apply_chat_template or False


def portions(*, is_first: bool) -> Iterator[int]:
    """How many documents each portion of a task has; `is_first`: of the job's first one."""
    return itertools.chain([FIRST_PORTION] * is_first, (PORTION << doubled for doubled in itertools.count()))


def build_instances(
    task: Task, evaluation: Evaluation, chat_template: ChatTemplate | None, sizes: Iterator[int]
) -> Iterator[list[Instance]]:
    """Render the prompts of a task, by portions of documents of these sizes; all end up in `task.instances`."""
    documents = task.doc_iterator(limit=get_sample_size(task, evaluation.limit))
    if getattr(task, "MULTIMODAL", False):
        sizes = (min(size, FIRST_PORTION) for size in sizes)  # of documents with images memory holds few
    instances: list[Instance] = []
    some = list(itertools.islice(documents, next(sizes)))
    while some or not instances:  # lm-eval's refusal of a task without documents is wanted
        with _documents(task, some):
            task.build_all_requests(
                system_instruction=evaluation.system_instruction,
                apply_chat_template=chat_template is not None,
                fewshot_as_multiturn=evaluation.fewshot_as_multiturn,
                chat_template=chat_template,
            )
        instances += task.instances
        yield task.instances
        some = list(itertools.islice(documents, next(sizes)))
    task._instances = instances


@contextlib.contextmanager
def _documents(task: Any, documents: list[tuple[int, Any]]) -> Generator[None]:
    """The task has only these (id, document) pairs meanwhile, and gives ImageProblems for what it cannot show."""
    meanwhile: dict[str, Any] = {"doc_iterator": lambda **_: iter(documents)}
    for name in _SHOWING:
        if (get := getattr(task, name, None)) is not None:
            meanwhile[name] = _guarded(get)
    vars(task).update(meanwhile)
    try:
        yield
    finally:
        for name in meanwhile:
            delattr(task, name)


def _guarded(get: Callable[..., Any]) -> Callable[..., Any]:
    return lambda doc, *field: had_or_problem(lambda doc: get(doc, *field), doc)


def release(task: Task) -> None:
    """Free the requests of a scored task."""
    task._instances = None


def score_task(
    name: str, task: Any, evaluation: Evaluation, errored: Mapping[int | None, str] | None = None
) -> TaskScore:
    """Filters, metrics and standard errors of a task whose instances have their responses (`evaluate`).

    Documents in `errored` lack some: lm-eval's metrics do not know such ones, so they are left out of the scores. Their
    samples have no metrics, but the error.
    """
    errored = errored or {}
    instances = _by_document(task.instances)
    task._instances = [instance for instance in task.instances if instance.doc_id not in errored]
    if task.instances:  # lm-eval's filters want something to filter
        task.apply_filters()
    keep_samples = evaluation.log_samples or evaluation.predict_only
    samples: list[dict[str, Any]] = []
    raw_metrics: Values = defaultdict(list)
    for filter_name in [ensemble.name for ensemble in task._filters]:
        for doc_id, doc in task.doc_iterator(limit=get_sample_size(task, evaluation.limit)):
            requests = instances[doc_id]
            if doc_id in errored:
                if keep_samples:
                    samples.append(_sample(task, doc_id, doc, requests, filter_name, {}, error=errored[doc_id]))
                continue
            metrics = task.process_results(doc, [request.filtered_resps[filter_name] for request in requests])
            if keep_samples:
                samples.append(_sample(task, doc_id, doc, requests, filter_name, metrics))
            for metric, value in metrics.items():
                raw_metrics[metric, filter_name].append(value)

    def aggregate(values: Values) -> EvalAcc:
        accumulator: Any = {"task": task, "raw_metrics": values, "logged_samples": []}
        return _collect_results({name: accumulator}, {}, evaluation.bootstrap_iters)

    accumulated, missing = aggregated(aggregate, raw_metrics, excluded=len(errored))
    metrics = dict(accumulated.metrics[name])
    return TaskScore(metrics, samples if keep_samples else None, accumulated, excluded=len(errored), missing=missing)


def combine_scores(scores: Iterable[TaskScore], groups: Mapping[str, Group]) -> dict[str, Any]:
    """lm-eval's results of all tasks and their groups, without samples."""
    total = EvalAcc()
    total.groups = dict(groups)
    for score in scores:
        one = score.accumulated
        total.metrics.update(one.metrics)
        total.configs.update(one.configs)
        total.versions.update(one.versions)
        total.num_fewshot.update(one.num_fewshot)
        total.higher_is_better.update(one.higher_is_better)
        total.n_samples.update(one.n_samples)
    return dict(aggregate_groups(total)._to_eval_results())


def _by_document(instances: Iterable[Instance]) -> dict[int | None, list[Instance]]:
    documents: defaultdict[int | None, list[Instance]] = defaultdict(list)
    for instance in instances:
        documents[instance.doc_id].append(instance)
    for some in documents.values():
        some.sort(key=lambda instance: instance.idx)
    return documents


def _sample(
    task: Task,
    doc_id: int,
    doc: Any,
    requests: list[Instance],
    filter_name: str,
    metrics: dict[str, Any],
    error: str | None = None,
) -> dict[str, Any]:
    target = task.doc_to_target(doc)
    ours = {} if error is None else {"evalpool_error": error}
    return (
        {
            "doc_id": doc_id,
            "doc": described(doc) if getattr(task, "MULTIMODAL", False) else doc,
            "target": target,
            "arguments": [request.args for request in requests],
            "resps": [request.resps for request in requests],
            "filtered_resps": [] if error else [request.filtered_resps[filter_name] for request in requests],
            "filter": filter_name,
            "metrics": list(metrics),
            "doc_hash": hash_text(json.dumps(requests[0].doc, indent=2, default=plain, ensure_ascii=False)),
            "prompt_hash": hash_text(requests[0].arguments[0]),
            "target_hash": hash_text(str(target)),
        }
        | metrics
        | ours
    )
