"""What the documents of lmms-eval's tasks ask: lmms-eval's instances, and lm-eval's for them.

Source: `Task.build_all_requests` of lmms-eval 0.7.3. Different, because broken there: the default stop string "\\n\\n",
which separates few-shot examples, ends no chat.
"""

# pyright: basic
from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lm_eval.api.instance import Instance

from gpu_pool.evaluator.harness_lm_eval import ChatTemplate
from gpu_pool.evaluator.images import ImageProblem, had_or_problem
from gpu_pool.evaluator.lmms_tasks import LmmsTask
from gpu_pool.evaluator.sounds import unheard
from gpu_pool.records import Evaluation

# after lmms_tasks, which undoes what importing them does
from lmms_eval.api.task import ConfigurableTask  # isort: skip
from gpu_pool.evaluator.lmms_prompts import Prompt, chat_prompt, text_prompt  # isort: skip

_FEWSHOT_DELIMITER = "\n\n"


def ask(
    task: LmmsTask, evaluation: Evaluation, chat_template: ChatTemplate | None, doc_id: int, doc: Any
) -> list[tuple[Any, Instance]]:
    """What one document asks (`Task.build_all_requests`): lmms-eval's instances, and ours."""
    inner = task.task
    config = inner.config
    metadata = {"task": config["task"], "doc_id": doc_id, "repeats": config.repeats, "split": task.split}
    if isinstance(config.metadata, dict):
        metadata |= config.metadata
    whole: Any = inner.dataset[task.split][doc_id]
    if task.is_generation and chat_template is not None and hasattr(inner, "doc_to_messages"):
        theirs: Any = inner.construct_requests(doc_id=doc_id, ctx="", metadata=metadata)
        messages = _messages(inner, whole)
        if isinstance(messages, ImageProblem):
            messages = [{"role": "user", "content": [_shown_problem(messages, task)]}]
        prompt = chat_prompt(
            messages,
            chat_template,
            modalities=task.modalities,
            system_instruction=evaluation.system_instruction,
        )
        return [(theirs, _instance(theirs, doc, prompt, _chat_options(config.generation_kwargs, evaluation)))]
    context = inner.fewshot_context(doc, config.num_fewshot, evaluation.system_instruction, False, False, None)
    made: Any = ConfigurableTask.construct_requests(inner, doc_id=doc_id, ctx=context, metadata=metadata)
    visuals = _had(inner.doc_to_visual, whole)
    asked: list[tuple[Any, Instance]] = []
    for theirs in made if isinstance(made, list) else [made]:
        text, then = theirs.args[:2]
        shown = visuals if len(theirs.args) > 2 else None  # a choice without its question shows nothing
        prompt = text_prompt(text, shown, chat_template if text else None, modalities=task.modalities)
        asked.append((theirs, _instance(theirs, doc, prompt, str(then(doc)) if callable(then) else then)))
    return asked


def _messages(inner: Any, doc: Any) -> Any:
    """The conversation of a document, or why it cannot be had. Where lmms-eval makes it of pictures and text, only the
    pictures' errors are the document's; those of its text are the task's."""
    if callable(inner.config.doc_to_messages):
        return _had(inner.doc_to_messages, doc)
    visuals = _had(inner.doc_to_visual, doc)
    if isinstance(visuals, ImageProblem):
        return visuals
    inner.doc_to_visual = lambda _: visuals
    try:
        return inner.doc_to_messages(doc)
    finally:
        del inner.doc_to_visual


def _had(get: Callable[[Any], Any], doc: Any) -> Any:
    """What a document shows, or the ImageProblem.

    Tasks of videos end the process where a file is missing; those of sounds show none, or silence, instead of one that
    cannot be decoded.
    """
    try:
        shown = had_or_problem(get, doc)
    except SystemExit as end:
        return ImageProblem(str(end))
    return unheard(doc) or shown


def _shown_problem(problem: ImageProblem, task: LmmsTask) -> dict[str, Any]:
    """A part of a message that stands for what cannot be shown."""
    kind = "image" if "image" in task.modalities else "audio"
    return {"type": kind, "url": problem}


def _instance(theirs: Any, doc: Any, prompt: Prompt, then: Any) -> Instance:
    """lm-eval's instance of an instance of lmms-eval; answers to the one are answers to the other."""
    text, media = prompt
    return Instance(
        request_type=theirs.request_type,
        doc=doc,
        arguments=(text, copy.deepcopy(then), *([media] if media else [])),
        idx=theirs.idx,
        metadata=(theirs.task_name, theirs.doc_id, theirs.repeats),
        resps=theirs.resps,
    )


def _chat_options(options: Mapping[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """Without the stop string that separates few-shot examples, unless the request gives it."""
    if "until" in evaluation.gen_kwargs:
        return dict(options)
    until = options.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop != _FEWSHOT_DELIMITER]
    return {**options, "until": stops}


def pictures_of(asked: Iterable[tuple[Any, Instance]]) -> Iterator[Any]:
    """Of the requests of one document, which show the same, those of the first."""
    for _, instance in itertools.islice(asked, 1):
        for media in instance.arguments[2:]:
            yield from media.get("visual", ())
