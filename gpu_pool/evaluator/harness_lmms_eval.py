"""lmms-eval's own steps, one task at a time: what its `simple_evaluate` and `evaluate` do, without their model call.

Source: `lmms_eval/evaluator.py` and `lmms_eval/evaluator_utils.py` 0.7.3. Tasks, prompts, filters, metrics, aggregation
and standard errors are lmms-eval's. Different, because broken there:
- The answers to log-likelihood requests are numbers, not their text. It takes the least of them for the choice, as it
  expects losses: it gets losses.
- A fraction of documents is taken of each task, not of the first one and of the others its number.
Tasks are scored on documents without their media, as by lmms-eval's command line.
"""

# pyright: basic
from __future__ import annotations

import itertools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import datasets
from lm_eval.api.instance import Instance

from gpu_pool.evaluator.harness_lm_eval import FIRST_PORTION, ChatTemplate, TaskError, set_fewshots
from gpu_pool.evaluator.images import decoded_bytes, described
from gpu_pool.evaluator.lmms_options import lmms_generation
from gpu_pool.evaluator.lmms_tasks import LmmsGroup, LmmsTask, submissions_in
from gpu_pool.evaluator.missing_scores import Values, aggregated
from gpu_pool.evaluator.scores import TaskScore
from gpu_pool.gen_kwargs import with_request
from gpu_pool.records import TEXT_ONLY, Evaluation, Modality
from gpu_pool.results import hash_text, plain

# after lmms_tasks, which undoes what importing them does
from lmms_eval.api.task import ConfigurableTask  # isort: skip
from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags  # isort: skip
from lmms_eval.evaluator_utils import (  # isort: skip
    TaskOutput,
    consolidate_group_results,
    consolidate_results,
    get_subtask_list,
    prepare_print_tasks,
)
from lmms_eval.filters.transformation import StripThinkingFilter  # isort: skip
from gpu_pool.evaluator.lmms_requests import ask, pictures_of  # isort: skip

MOST_DECODED_BYTES = 256 << 20
"""Of images that tasks' code has decoded: a portion with as much is not made larger."""
_log = logging.getLogger(__name__)


def configure_task(
    name: str,
    task: LmmsTask,
    evaluation: Evaluation,
    allow_code: bool,
    *,
    modalities: Set[Modality] = TEXT_ONLY,
    output_dir: str | None = None,
    max_images: int | None = None,
) -> None:
    """Apply the request's overrides to one task (`simple_evaluate`). Submission has seen to code of the model's.

    Its few-shot examples show no images, so that `max_images` changes nothing here.

    Raises:
        TaskError: it has no few-shot examples.
    """
    inner = task.task
    task.modalities = modalities
    submissions_in(task, output_dir)
    if task.is_generation:
        options = with_request(inner.config.generation_kwargs or {}, evaluation.gen_kwargs)
        inner.set_config(key="generation_kwargs", value=lmms_generation(options))
        _log.info("%s: generation_kwargs %s", name, inner.config.generation_kwargs)
    if evaluation.predict_only:
        inner.override_metric(metric_name="bypass")
    set_fewshots(name, inner, evaluation)
    if inner.config.num_fewshot and not hasattr(inner, "sampler"):
        raise TaskError(f"{name} has no few-shot examples (no fewshot_config in its YAML): num_fewshot must be 0")


def wanted_template(task: LmmsTask, evaluation: Evaluation, *, has_template: bool) -> bool | str:
    """The model's where it generates, as all models of lmms-eval do, unless the request says otherwise."""
    if evaluation.apply_chat_template is None:
        return has_template and task.is_generation
    return evaluation.apply_chat_template


def build_instances(
    task: LmmsTask, evaluation: Evaluation, chat_template: ChatTemplate | None, sizes: Iterator[int]
) -> Iterator[list[Instance]]:
    """Render the prompts of a task, by portions of documents of these sizes, or less where they show images.

    Generation with a chat template asks by `doc_to_messages`; all else by `doc_to_visual` and the context.
    """
    documents = _documents(task, evaluation)
    if not documents:
        raise TaskError(f"{task.name} has no documents")
    shows = task.task.config.doc_to_visual is not None or task.task.config.doc_to_messages is not None
    start = 0
    while start < len(documents):
        size = min(next(sizes), FIRST_PORTION) if shows else next(sizes)
        asked: list[tuple[Any, Instance]] = []
        held = 0
        while start < len(documents) and size and held < MOST_DECODED_BYTES:
            of_document = ask(task, evaluation, chat_template, start, documents[start])
            held += decoded_bytes(pictures_of(of_document))
            asked += of_document
            start, size = start + 1, size - 1
        task.asked += asked
        yield [instance for _, instance in asked]


def _documents(task: LmmsTask, evaluation: Evaluation) -> datasets.Dataset:
    """Without their media."""
    documents: Any = task.task.eval_docs_no_media
    limit = evaluation.limit
    if limit is None:
        return documents
    count = math.ceil(len(documents) * limit) if isinstance(limit, float) and limit < 1 else int(limit)
    return documents.select(range(min(count, len(documents))))


def release(task: LmmsTask) -> None:
    """Free the requests of a scored task."""
    task.asked = []
    task.task._instances = None


# ---------------------------------------------------------------- scores


def score_task(
    name: str, task: LmmsTask, evaluation: Evaluation, errored: Mapping[int | None, str] | None = None
) -> TaskScore:
    """Filters, metrics and standard errors of a task whose instances have their responses (`evaluate`).

    Documents in `errored` lack some, and are left out of the scores. Their samples have no metrics, but the error.
    """
    errored = errored or {}
    inner = task.task
    filters: list[Any] = inner._filters
    tags = parse_reasoning_tags_config(task_value=inner.config.reasoning_tags)
    if inner.config.auto_strip_thinking and tags is None:
        for ensemble in filters:
            ensemble.filters.insert(0, StripThinkingFilter())
    inner._instances = [theirs for theirs, _ in task.asked if theirs.doc_id not in errored]
    if inner._instances:
        inner.apply_filters()
    by_document = _by_document(task.asked)
    keep_samples = evaluation.log_samples or evaluation.predict_only
    samples: list[dict[str, Any]] = []
    values: Values = defaultdict(list)
    for filter_name in [ensemble.name for ensemble in filters]:
        for doc_id, doc in enumerate(_documents(task, evaluation)):
            asked = by_document[doc_id]
            responses: list[Any] = []
            metrics: dict[str, Any] = {}
            if doc_id not in errored:
                responses = [_without_reasoning(theirs.filtered_resps[filter_name], tags) for theirs, _ in asked]
                metrics = inner.process_results(doc, _as_expected(inner, responses))
            if keep_samples:
                samples.append(_sample(inner, doc_id, doc, asked, filter_name, responses, metrics, errored.get(doc_id)))
            for metric, value in metrics.items():
                if metric in inner.aggregation():  # of others there is no score
                    values[metric, filter_name].append(value)

    def aggregate(values: Values) -> TaskOutput:
        output = TaskOutput.from_taskdict(task.own_name, inner)
        output.sample_metrics.update(values)
        output.calculate_aggregate_metric(bootstrap_iters=evaluation.bootstrap_iters)
        output.calculate_clt_aggregate_metric()
        return output

    output, missing = aggregated(aggregate, values, excluded=len(errored))
    results, *_ = consolidate_results([output])
    metrics = {key: value for key, value in results[task.own_name].items() if key != "samples"}
    accumulated = (task, output, evaluation)
    return TaskScore(metrics, samples if keep_samples else None, accumulated, excluded=len(errored), missing=missing)


def _by_document(asked: Iterable[tuple[Any, Instance]]) -> dict[int, list[tuple[Any, Instance]]]:
    documents: defaultdict[int, list[tuple[Any, Instance]]] = defaultdict(list)
    for pair in asked:
        documents[pair[0].doc_id].append(pair)
    for some in documents.values():
        some.sort(key=lambda pair: pair[0].idx)
    return documents


def _without_reasoning(response: Any, tags: Any) -> Any:
    if tags is None:
        return response
    if isinstance(response, list):
        return [_without_reasoning(one, tags) for one in response]
    return strip_reasoning_tags(response, tags) if isinstance(response, str) else response


def _as_expected(task: ConfigurableTask, responses: list[Any]) -> Any:
    """Responses as `process_results` reads them: losses of choices; a single one's log-likelihood by itself."""
    if task.OUTPUT_TYPE == "multiple_choice":
        return [(-logprob, is_greedy) for logprob, is_greedy in responses]
    if task.OUTPUT_TYPE == "loglikelihood" and not callable(task.config.process_results):
        return responses[0]
    return responses


def _sample(
    task: ConfigurableTask,
    doc_id: int,
    doc: Any,
    asked: Sequence[tuple[Any, Instance]],
    filter_name: str,
    responses: list[Any],
    metrics: dict[str, Any],
    error: str | None,
) -> dict[str, Any]:
    """A record as of lm-eval's tasks."""
    target = task.doc_to_target(doc)
    shown = described(doc)
    ours = {} if error is None else {"evalpool_error": error}
    return (
        {
            "doc_id": doc_id,
            "doc": shown,
            "target": target,
            "arguments": [instance.args for _, instance in asked],
            "resps": [instance.resps for _, instance in asked],
            "filtered_resps": responses,
            "filter": filter_name,
            "metrics": list(metrics),
            "doc_hash": hash_text(json.dumps(shown, indent=2, default=plain, ensure_ascii=False)),
            "prompt_hash": hash_text(asked[0][1].args[0]),
            "target_hash": hash_text(str(target)),
        }
        | metrics
        | ours
    )


def combine_scores(scores: Iterable[TaskScore], groups: Mapping[str, LmmsGroup]) -> dict[str, Any]:
    """lmms-eval's results of all tasks and their groups, without samples, under full names."""
    scored = [score.accumulated for score in scores]
    outputs: list[Any] = [output for _, output, _ in scored]
    full = {task.own_name: task.name for task, _, _ in scored}
    tree: dict[Any, Any] = {}
    for name, group in groups.items():
        full |= {own.group_name: name for own in group.tree}
        tree |= group.tree if group.is_top else {}
    within = set(itertools.chain.from_iterable(get_subtask_list(tree).values()))
    tree |= {task.own_name: task.task for task, _, _ in scored if task.own_name not in within}
    results, _, configs, versions, shots, higher_is_better = consolidate_results(outputs)
    results, versions, _, *_ = consolidate_group_results(results, versions, tree)
    by_name, of_groups = prepare_print_tasks(tree, results)
    subtasks = get_subtask_list(tree)
    parts = {
        "results": {name: _plain(values) for name, values in by_name.items()},
        "groups": {name: _plain(values) for name, values in of_groups.items() if " " not in values},
        "configs": configs,
        "versions": versions,
        "n-shot": shots,
        "higher_is_better": higher_is_better,
        "n-samples": {task.own_name: _counts(task, evaluation) for task, _, evaluation in scored},
    }
    renamed = {key: {full.get(name, name): item for name, item in part.items()} for key, part in parts.items() if part}
    named = {full.get(group, group): [full.get(name, name) for name in members] for group, members in subtasks.items()}
    return {**renamed, "group_subtasks": named}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the blank that stands for a group's missing score."""
    return {key: value for key, value in values.items() if key not in (" ", "samples")}


def _counts(task: LmmsTask, evaluation: Evaluation) -> dict[str, int]:
    return {"original": len(task.task.eval_docs), "effective": len(_documents(task, evaluation))}
