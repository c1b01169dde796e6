"""What a job asks of a library of tasks. `harness_lm_eval` and `harness_lmms_eval` are the two modules that answer it.

A job knows tasks by name only. What else it hands from one step to the next is the library's own: a task, an instance's
document, a group.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, Protocol

from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from gpu_pool.evaluator import harness_lm_eval
from gpu_pool.evaluator.harness_lm_eval import ChatTemplate
from gpu_pool.evaluator.scores import TaskScore
from gpu_pool.records import TEXT_ONLY, Evaluation, Modality


class Harness(Protocol):
    """The steps of a task, in this order: `configure_task`, `build_instances`, then, when the answers are in the
    instances' `resps`, `score_task` and `release`. `combine_scores` follows once all tasks are scored."""

    def configure_task(
        self,
        name: str,
        task: Any,
        evaluation: Evaluation,
        allow_code: bool,
        *,
        modalities: Set[Modality] = TEXT_ONLY,
        output_dir: str | None = None,
        max_images: int | None = None,
    ) -> None:
        """Apply the request's overrides to one task, whose own files go into `output_dir`, and whose few-shot examples
        leave room for its own images among `max_images`.

        Raises:
            TaskError: it cannot run here.
        """
        ...

    def wanted_template(self, task: Any, evaluation: Evaluation, *, has_template: bool) -> bool | str:
        """Which chat template makes the task's prompts: none, the model's, or that of a name."""
        ...

    def build_instances(
        self, task: Any, evaluation: Evaluation, chat_template: ChatTemplate | None, sizes: Iterator[int]
    ) -> Iterator[list[Instance]]:
        """lm-eval's instances, by portions of documents of these sizes.

        Their arguments are (context, continuation or generation options), and of those with media {"visual": images,
        and Videos among them, "audio": sounds, "video": videos}; the context has a placeholder for each of them, unless
        a chat template has made it.
        """
        ...

    def score_task(
        self, name: str, task: Any, evaluation: Evaluation, errored: Mapping[int | None, str] | None = None
    ) -> TaskScore:
        """The scores of a task whose instances have their responses, but those of documents in `errored`."""
        ...

    def release(self, task: Any) -> None:
        """Free the requests of a scored task."""
        ...

    def combine_scores(self, scores: Iterable[TaskScore], groups: Mapping[str, Any]) -> dict[str, Any]:
        """lm-eval's results of all tasks and their groups, without samples."""
        ...


def harness_of(task: Any) -> Harness:
    """Whose a task or a group is."""
    if isinstance(task, Task | Group):
        return harness_lm_eval
    from gpu_pool.evaluator import harness_lmms_eval  # only who has such a task waits for its imports

    return harness_lmms_eval


def combine(tasks: Mapping[str, Any], scores: Mapping[str, TaskScore], groups: Mapping[str, Any]) -> dict[str, Any]:
    """The results of all libraries in one."""
    libraries = list({id(harness_of(task)): harness_of(task) for task in tasks.values()}.values())
    results: dict[str, Any] = {}
    for library in libraries:
        some = [scores[name] for name, task in tasks.items() if harness_of(task) is library]
        within = {name: group for name, group in groups.items() if harness_of(group) is library}
        for key, value in library.combine_scores(some, within).items():
            results[key] = {**results.get(key, {}), **value} if isinstance(value, dict) else value
    return results
