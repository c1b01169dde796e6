"""lmms-eval's tasks, as its own TaskManager makes them.

Importing this imports lmms-eval, and torch with it: only a job with such a task does. What lmms-eval does to the whole
process then is undone or replaced here. Source: `lmms_eval/tasks/__init__.py` and `lmms_eval/api/` 0.7.3.
"""

# pyright: basic
from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.tasks._index import Entry, Kind
from PIL import Image, ImageFile

from gpu_pool.records import TEXT_ONLY, Modality

os.environ.setdefault("LOGURU_LEVEL", "INFO")  # what it writes goes into the jobs' logs
_load_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
with warnings.catch_warnings():  # it turns all warnings off
    from lmms_eval.api import metrics
    from lmms_eval.api.group import ConfigurableGroup
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
    from lmms_eval.tasks import TaskManager
ImageFile.LOAD_TRUNCATED_IMAGES = _load_truncated  # a truncated image is an error of its document

_KINDS = {Kind.TASK: "task", Kind.PY_TASK: "python_task", Kind.GROUP: "group", Kind.TAG: "tag"}


@dataclass(eq=False)
class LmmsTask:
    """One task of a job, and what was asked for it."""

    name: str
    """The full name."""
    own_name: str
    """lmms-eval's."""
    task: Any
    """Its ConfigurableMessagesTask, or a class of the task's own."""
    modalities: Set[Modality] = TEXT_ONLY
    """What the model takes."""
    asked: list[tuple[Any, Instance]] = field(default_factory=list)
    """lmms-eval's instances and what is asked for each; their lists of responses are one."""

    @property
    def is_generation(self) -> bool:
        """Whether the model writes its answers, rather than choose among given ones."""
        return self.task.OUTPUT_TYPE == "generate_until"

    @property
    def media_folders(self) -> list[Path]:
        """Where relative paths of media may lie: beside the data files, or in the data folder."""
        options = self.task.config.dataset_kwargs or {}
        files = options.get("data_files") or ()
        groups = files.values() if isinstance(files, dict) else [files]
        names = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
        folders = [Path(name).parent for name in names]
        return [*folders, *(Path(str(place)) for place in (options.get("data_dir"), self.task.DATASET_PATH) if place)]

    @property
    def split(self) -> str:
        """The split that is evaluated."""
        config = self.task.config
        return config.test_split if self.task.has_test_docs() else config.validation_split


@dataclass(frozen=True, eq=False)
class LmmsGroup:
    """One group of a job."""

    tree: Mapping[Any, Any]
    """lmms-eval's nested dictionary with this group alone on top; None below another one."""
    is_top: bool
    full_name: Callable[[str], str]
    """Of a task or group of lmms-eval."""


class _Manager(TaskManager):
    """lmms-eval's TaskManager over an index that exists already.

    All its tasks are those that can make messages, which can all that others can: how a job asks is decided later.
    """

    def __init__(self, entries: Mapping[str, Entry], model: str) -> None:
        super().__init__(include_defaults=False, model_name=model)
        self._task_index = {name: _registered(entry) for name, entry in entries.items()}
        self._all_tasks = sorted(entries)

    def _load_individual_task_or_group(
        self, name_or_config: Any = None, task_type: str = "chat", parent_name: Any = None, update_config: Any = None
    ) -> Mapping[Any, Any]:
        return super()._load_individual_task_or_group(name_or_config, "chat", parent_name, update_config)


def load_lmms_tasks(
    names: Sequence[str], entries: Mapping[str, Entry], full_name: Callable[[str], str], model: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The LmmsTasks and LmmsGroups of these names of lmms-eval, newly built, by their full names.

    `model` is the kind of model, whose own prompts some tasks have.
    """
    manager = _Manager(entries, model)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        for key, value in manager.load_task_or_group([name]).items():
            for group, tree, is_top in _groups(key, value, is_top=True):
                groups[full_name(group)] = LmmsGroup(tree, is_top, full_name)
            for own_name, task in _leaves(key, value):
                tasks.setdefault(full_name(own_name), LmmsTask(full_name(own_name), own_name, task))
    return tasks, groups


def submissions_in(task: LmmsTask, folder: str | None) -> None:
    """Let files that the task itself writes, for a leaderboard say, go into that folder."""
    task.task.args = Namespace(output_path=folder, log_samples_suffix="evalpool", model="evalpool")


def _registered(entry: Entry) -> dict[str, Any]:
    """An entry of `TaskManager.task_index`."""
    kind = _KINDS[entry.kind]
    if kind == "tag":
        return {"type": kind, "task": sorted(entry.tags), "yaml_path": -1}
    return {"type": kind, "task": -1, "yaml_path": str(entry.yaml_path)}


def _leaves(key: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for inner, task in value.items():
            yield from _leaves(inner, task)
    else:
        yield key, value


def _groups(key: Any, value: Any, *, is_top: bool) -> Iterator[tuple[str, Mapping[Any, Any], bool]]:
    if not isinstance(key, ConfigurableGroup):
        return
    yield key.group_name, {key: value}, is_top
    for inner, below in value.items():
        yield from _groups(inner, below, is_top=False)


# ---------------------------------------------------------------- what is replaced in lmms-eval


def _bootstrap_stderr(f: Callable[[Sequence[Any]], float], xs: Sequence[Any], iters: int) -> float:
    """lmms-eval's, number for number, without its pool of processes."""
    chunk = min(1000, iters)
    resampled = metrics._bootstrap_internal(f, chunk)
    return metrics.sample_stddev([value for seed in range(iters // chunk) for value in resampled((seed, xs))])


def _typed_visual(typed: Callable[[Any], dict[str, Any]]) -> Any:
    def visual_to_content(cls: type, visual: Any) -> dict[str, Any]:
        """lmms-eval's, but a sound's samples or file are no video, and a file in the data set is not looked for where
        it once was."""
        if isinstance(visual, dict) and not isinstance(visual, Image.Image):
            if "array" in visual:
                return {"type": "audio", "url": visual}
            if visual.get("bytes") is not None:
                return {"type": visual.get("type", "video"), "url": visual}
        return typed(visual)

    return classmethod(visual_to_content)


def _patch() -> None:
    """Sounds are told from videos, and an error is raised at once, and as what it is: lmms-eval tries five times and
    then says RetryError."""
    ConfigurableMessagesTask._visual_to_content = _typed_visual(ConfigurableMessagesTask._visual_to_content)
    for method in ("download", "process_results"):
        setattr(ConfigurableTask, method, getattr(ConfigurableTask, method).__wrapped__)
    metrics.bootstrap_stderr = _bootstrap_stderr


_patch()
