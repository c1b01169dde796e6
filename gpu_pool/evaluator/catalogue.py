"""The tasks that can be evaluated here: lm-eval's library and the operator's own folders."""

# pyright: basic
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks.manager import TaskDict

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.dataset_roots import DatasetRoots
from gpu_pool.evaluator.lazy_task import LazyTaskFactory
from gpu_pool.evaluator.task_checks import TaskChecker
from gpu_pool.evaluator.task_index import LIBRARY_ROOT, RootIndex, library_cache, load_index, root_state, to_entries
from gpu_pool.messages import TaskEntry, TaskProblem

_log = logging.getLogger(__name__)


class UnknownTask(PoolError):
    """There is no such task."""


class TaskLibrary:
    """Everything that `tasks` of a request may name. One a process: it redirects `datasets.load_dataset`."""

    def __init__(
        self, data_dir: Path, include_paths: Sequence[str], dataset_roots: dict[str, str], allow_code: bool
    ) -> None:
        """`include_paths` are folders of task YAML, the later ones winning; `allow_code`: run code of the model's."""
        self._cache_dir = data_dir / "cache"
        self._roots = DatasetRoots(dataset_roots, self._cache_dir / "datasets")
        self._roots.install()
        self._folders = [Path(path) for path in include_paths]
        self._factory = LazyTaskFactory()
        self._checker = TaskChecker(self._roots, allow_code)
        self._indexes: dict[Path, RootIndex] = {}
        self._refresh()

    def entries(self) -> tuple[TaskEntry, ...]:
        """Every task, group and tag, sorted by name."""
        self._refresh()
        kinds: dict[str, Literal["task", "group", "tag"]] = {"GROUP": "group", "TAG": "tag"}
        found = {
            task.name: TaskEntry(name=task.name, kind=kinds.get(task.kind, "task"), output_type=task.output_type)
            for index in self._indexes.values()
            for task in index.tasks
        }
        return tuple(found[name] for name in sorted(found))

    def load(self, names: Sequence[str]) -> TaskDict:
        """The tasks and groups of these names, newly built; their data stays warm between calls.

        Raises:
            UnknownTask: a name is not in the library. (lm-eval would take it for the path of a YAML file.)
            DatasetRootError, MissingSplit: the local files of a mapped data set lack something.
        """
        self._refresh()
        for name in names:
            if name not in self._manager.task_index:
                raise UnknownTask(f"There is no task {name!r}")
        return self._manager.load(list(dict.fromkeys(names)))

    def check(
        self, names: Sequence[str], num_fewshot: int | None = None, *, reads_images: bool = False
    ) -> tuple[TaskProblem, ...]:
        """What keeps these tasks from running here, on a model that reads images or does not; nothing is downloaded."""
        self._refresh()
        broken = {path: reason for index in self._indexes.values() for path, reason in index.broken.items()}
        return self._checker.check(names, self._manager.task_index, broken, num_fewshot, reads_images)

    def _refresh(self) -> None:
        """Take in what has changed in the operator's folders."""
        roots = [LIBRARY_ROOT, *self._folders]
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
        self._indexes = {root: self._indexes[root] for root in roots}
        self._checker.forget()
        self._manager = _IndexedTaskManager(to_entries(self._indexes.values()), self._factory)


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
