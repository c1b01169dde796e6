"""The tasks that can be evaluated here: lm-eval's library, the operator's own folders, lmms-eval's if it is there."""

# pyright: basic
from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path
from typing import Literal

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks.manager import TaskDict

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.dataset_roots import DatasetRoots
from gpu_pool.evaluator.lazy_task import LazyTaskFactory
from gpu_pool.evaluator.task_checks import Abilities, TaskChecker, unknown
from gpu_pool.evaluator.task_index import (
    LIBRARY_ROOT,
    LMMS_EVAL_ROOT,
    IndexedTask,
    RootIndex,
    library_cache,
    load_index,
    root_state,
    to_entries,
)
from gpu_pool.evaluator.task_names import Library, TaskNames
from gpu_pool.evaluator.task_needs import lmms_task_needs
from gpu_pool.messages import TaskEntry, TaskProblem
from gpu_pool.records import TEXT_ONLY, Modality

_KINDS: dict[str, Literal["task", "group", "tag"]] = {"GROUP": "group", "TAG": "tag"}

_log = logging.getLogger(__name__)


class UnknownTask(PoolError):
    """There is no such task."""


class TaskLibrary:
    """Everything that `tasks` of a request may name. One a process: it redirects `datasets.load_dataset`."""

    def __init__(
        self,
        data_dir: Path,
        include_paths: Sequence[str],
        dataset_roots: dict[str, str],
        allow_code: bool,
        *,
        allow_judges: bool = False,
    ) -> None:
        """`include_paths` are folders of task YAML, the later ones winning; `allow_code`: run code of the model's;
        `allow_judges`: let scoring ask other models over the network."""
        self._cache_dir = data_dir / "cache"
        self._roots = DatasetRoots(dataset_roots, self._cache_dir / "datasets")
        self._roots.install()
        self._folders = [LIBRARY_ROOT, *map(Path, include_paths)]
        self._factory = LazyTaskFactory()
        self._checkers: dict[Library, TaskChecker] = {
            "lm": TaskChecker(self._roots, allow_code),
            "lmms": TaskChecker(self._roots, allow_code, lmms_task_needs, allow_judges=allow_judges),
        }
        self._indexes: dict[Path, RootIndex] = {}
        self._lmms_entries = self._index_of_lmms_eval()
        self._refresh()

    def entries(self) -> tuple[TaskEntry, ...]:
        """Every task, group and tag, sorted by name."""
        self._refresh()
        found = [self._entry("lm", task) for folder in self._folders for task in self._indexes[folder].tasks]
        if LMMS_EVAL_ROOT is not None:
            found += [self._entry("lmms", task) for task in self._indexes[LMMS_EVAL_ROOT].tasks]
        by_name = {entry.name: entry for entry in found}  # the later ones win
        return tuple(by_name[name] for name in sorted(by_name))

    def load(self, names: Sequence[str], model: str = "hf") -> TaskDict:
        """The tasks and groups of these names, newly built; their data stays warm between calls.

        `model` is what the request calls it: for some kinds tasks of lmms-eval have prompts of their own. Its tasks are
        LmmsTasks, under their full names.

        Raises:
            UnknownTask: a name is not in the library. (lm-eval would take it for the path of a YAML file.)
            DatasetRootError, MissingSplit: the local files of a mapped data set lack something.
        """
        self._refresh()
        wanted: dict[Library, list[str]] = {"lm": [], "lmms": []}
        for name in names:
            meant = self._names.find(name)
            if meant is None:
                raise UnknownTask(f"There is no task {name!r}")
            wanted[meant[0]].append(meant[1])
        loaded: TaskDict = self._manager.load(list(dict.fromkeys(wanted["lm"])))
        if wanted["lmms"]:
            from gpu_pool.evaluator.lmms_tasks import load_lmms_tasks  # which takes seconds, and torch

            own_names = list(dict.fromkeys(wanted["lmms"]))
            tasks, groups = load_lmms_tasks(own_names, self._lmms_entries, partial(self._names.full, "lmms"), model)
            loaded["tasks"].update(tasks)
            loaded["groups"] = {**loaded.get("groups", {}), **groups}
        return loaded

    def check(
        self,
        names: Sequence[str],
        num_fewshot: int | None = None,
        modalities: Set[Modality] = TEXT_ONLY,
        *,
        no_scores: str | None = None,
    ) -> tuple[TaskProblem, ...]:
        """What keeps these tasks from running here, on a model that takes `modalities`; nothing is downloaded.

        It gives no log-likelihoods for the reason `no_scores`, or does (None).
        """
        self._refresh()
        model = Abilities(modalities=modalities, no_scores=no_scores)
        problems: dict[str, TaskProblem] = {}
        asked: dict[tuple[Library, str], str] = {}
        for name in names:
            meant = self._names.find(name)
            if meant is None:
                problems[name] = self._unknown(name)
            else:
                asked.setdefault(meant, name)
        indexes: dict[Library, dict[str, Entry]] = {"lm": self._manager.task_index, "lmms": self._lmms_entries}
        for library, checker in self._checkers.items():
            some = [name for which, name in asked if which == library]
            for problem in checker.check(some, indexes[library], self._broken, num_fewshot, model):
                name = asked[library, problem.task]
                problems[name] = TaskProblem(task=name, reason=problem.reason, suggestions=problem.suggestions)
        return tuple(problems[name] for name in dict.fromkeys(names) if name in problems)

    def _unknown(self, name: str) -> TaskProblem:
        if name.startswith("lmms:") and LMMS_EVAL_ROOT is None:
            return TaskProblem(task=name, reason="lmms-eval is not installed on this server (see scripts/install-lmms)")
        full_names = [
            *self._manager.task_index,
            *(self._names.full("lmms", other) for other in self._lmms_entries),
        ]
        return unknown(name, full_names, self._broken)

    def _entry(self, library: Library, task: IndexedTask) -> TaskEntry:
        documents = None
        if task.dataset and task.split:
            documents = self._roots.rows(task.dataset, task.config, task.split)
        return TaskEntry(
            name=self._names.full(library, task.name),
            kind=_KINDS.get(task.kind, "task"),
            library="lmms-eval" if library == "lmms" else "lm-eval",
            output_type=task.output_type,
            modality=task.modality,
            documents=documents,
            note=self._names.note(library, task.name),
        )

    @property
    def _broken(self) -> dict[str, str]:
        return {path: reason for index in self._indexes.values() for path, reason in index.broken.items()}

    def _index_of_lmms_eval(self) -> dict[str, Entry]:
        if LMMS_EVAL_ROOT is None:
            return {}
        self._indexes[LMMS_EVAL_ROOT] = load_index(LMMS_EVAL_ROOT, library_cache(self._cache_dir))
        return to_entries([self._indexes[LMMS_EVAL_ROOT]])

    def _refresh(self) -> None:
        """Take in what has changed in the operator's folders."""
        roots = self._folders
        stale = [root for root in roots if root not in self._indexes or self._indexes[root].state != root_state(root)]
        if not stale:
            return
        for root in stale:
            self._indexes[root] = load_index(
                root, library_cache(self._cache_dir) if root == LIBRARY_ROOT else self._cache_dir
            )
            if root != LIBRARY_ROOT:
                for path, reason in self._indexes[root].broken.items():
                    _log.warning("%s is no task and is left out: %s", path, reason)
        for checker in self._checkers.values():
            checker.forget()
        self._manager = _IndexedTaskManager(to_entries(self._indexes[root] for root in roots), self._factory)
        self._names = TaskNames(self._manager.task_index, self._lmms_entries)


class _IndexedTaskManager(TaskManager):
    """lm-eval's TaskManager over an index that exists already."""

    def __init__(self, index: dict[str, Entry], factory: LazyTaskFactory) -> None:
        self.include_path = None
        self.metadata = None
        self._factory = factory
        self._index = index
        self._all_tasks = sorted(index)
        self._all_subtasks = self._names(Kind.TASK, Kind.PY_TASK)
        self._all_groups = self._names(Kind.GROUP)
        self._all_tags = self._names(Kind.TAG)

    def _names(self, *kinds: Kind) -> list[str]:
        return sorted(name for name, entry in self._index.items() if entry.kind in kinds)
