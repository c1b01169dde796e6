"""Can the requested tasks run here? Asked before a job is queued, so that a mistake shows at once."""

# pyright: basic
from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks._index import Entry, Kind

from gpu_pool.errors import PoolError
from gpu_pool.evaluator.dataset_roots import DatasetRoots
from gpu_pool.evaluator.failures import explain
from gpu_pool.evaluator.hub_data import HubData
from gpu_pool.evaluator.task_needs import TaskNeeds, read_config, task_needs
from gpu_pool.messages import TaskProblem
from gpu_pool.records import TEXT_ONLY, Modality
from gpu_pool.suggestions import close_names

Index = Mapping[str, Entry]


@dataclass(frozen=True)
class _Leaf:
    """One task that a requested name stands for, with what the groups above it override."""

    name: str
    source: str
    """lm-eval's name for where it comes from: the top group, or the task itself."""
    entry: Entry | None
    overrides: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a model can do."""

    modalities: Set[Modality] = TEXT_ONLY
    no_scores: str | None = None
    """Why it gives no log-likelihoods; None: it does."""


TEXT_MODEL = Abilities()


class TaskChecker:
    """Checks names against an index; what a YAML says is read once, until `forget`."""

    def __init__(
        self,
        roots: DatasetRoots,
        allow_code: bool,
        needs_of: Callable[[str, dict[str, Any]], TaskNeeds] = task_needs,
        *,
        allow_judges: bool = False,
    ) -> None:
        """`needs_of` reads the configurations of one library's tasks."""
        self._read_needs = needs_of
        self._roots = roots
        self._allow_code = allow_code
        self._allow_judges = allow_judges
        self._hub = HubData()
        self._configs: dict[Path, dict[str, Any]] = {}
        self._needs: dict[tuple[str, str], TaskNeeds | str] = {}

    def forget(self) -> None:
        """Files have changed."""
        self._configs.clear()
        self._needs.clear()

    def check(
        self,
        names: Sequence[str],
        index: Index,
        broken: Mapping[str, str],
        num_fewshot: int | None,
        model: Abilities = TEXT_MODEL,
    ) -> tuple[TaskProblem, ...]:
        """One problem for each name that cannot run on the model; `broken` are unreadable YAML files and why."""
        problems: list[TaskProblem] = []
        sources: dict[str, str] = {}
        for name in dict.fromkeys(names):
            if name not in index:
                problems.append(unknown(name, index, broken))
                continue
            try:
                leaves = list(self._leaves(name, index))
            except Exception as error:  # a group's YAML is the user's: whatever is wrong with it, say so
                problems.append(TaskProblem(task=name, reason=f"{name} cannot be read: {explain(error)}"))
                continue
            reason = _twice(name, leaves, sources) or self._first_reasons(name, leaves, num_fewshot, model)
            if reason:
                problems.append(TaskProblem(task=name, reason=reason))
        return tuple(problems)

    # ------------------------------------------------------------ names to leaves

    def _leaves(self, name: str, index: Index) -> Iterator[_Leaf]:
        entry = index[name]
        if entry.kind == Kind.TAG:
            yield from (_Leaf(task, task, index[task], {}) for task in sorted(entry.tags) if task in index)
        elif entry.kind == Kind.GROUP:
            yield from self._members(name, self._config(entry), {}, name, index, (name,))
        else:
            yield _Leaf(name, name, entry, {})

    def _members(
        self, group: str, config: dict[str, Any], above: dict[str, Any], top: str, index: Index, path: tuple[str, ...]
    ) -> Iterator[_Leaf]:
        """The leaves of a group, as `TaskFactory._build_group` builds them."""
        overrides = {key: value for key, value in config.items() if key not in _GROUP_KEYS} | above
        members = config.get("task")
        for member in members if isinstance(members, list) else []:
            item = {"task": member} if isinstance(member, str) else member
            merged = overrides | {key: value for key, value in item.items() if key not in _GROUP_KEYS}
            name = item.get("group") or item.get("task")
            if name is None:
                raise ValueError(f"a member of group {group} names neither a `task` nor a `group`")
            entry = index.get(name)
            if entry is None and "group" in item:
                yield from self._members(f"{group}::{name}", item, overrides, top, index, path)
            elif entry is None:
                yield _Leaf(f"{group}::{name}", top, None, merged)
            elif entry.kind == Kind.GROUP:
                if name in path:
                    raise ValueError(f"group {name} contains itself")
                yield from self._members(name, self._config(entry), merged, top, index, (*path, name))
            elif entry.kind == Kind.TAG:
                yield from (_Leaf(task, top, index[task], merged) for task in sorted(entry.tags))
            else:
                yield _Leaf(name, top, entry, merged)

    def _config(self, entry: Entry) -> dict[str, Any]:
        path = entry.yaml_path
        assert path is not None  # only tags have none
        if path not in self._configs:
            self._configs[path] = read_config(path, {})
        return self._configs[path]

    # ------------------------------------------------------------ leaves to reasons

    def _first_reasons(
        self, name: str, leaves: Sequence[_Leaf], num_fewshot: int | None, model: Abilities
    ) -> str | None:
        reasons: dict[str, list[str]] = {}
        for leaf in leaves:
            reason = self._reason(leaf, num_fewshot, model)
            if reason:
                reasons.setdefault(reason, []).append(leaf.name)
        if not reasons:
            return None if leaves else f"{name} has no tasks"
        reason, tasks = next(iter(reasons.items()))
        failing = sum(len(some) for some in reasons.values())
        if tasks == [name]:
            return f"{name} cannot run: {reason}"
        more = f" (one of {failing} such tasks)" if failing > 1 else ""
        return f"{name} cannot run: its task {tasks[0]}{more}: {reason}"

    def _reason(self, leaf: _Leaf, num_fewshot: int | None, model: Abilities) -> str | None:
        needs = self._needs_of(leaf)
        if isinstance(needs, str):
            return needs
        if needs.unknown_keys:
            return f"lm-eval does not know these keys of its YAML: {', '.join(needs.unknown_keys)}"
        if needs.eval_split is None and not needs.has_class:
            return "its YAML names neither a test_split nor a validation_split"
        if reason := _modality_reason(needs, model.modalities):
            return reason
        if needs.scores and model.no_scores is not None:
            return f"it asks for log-likelihoods: {model.no_scores}"
        if needs.runs_code and not self._allow_code:
            return "it runs code written by the model, which the operator has not allowed (allow_code_execution)"
        if needs.asks_judge and not self._allow_judges:
            return "its scoring asks a judge over the network, which the operator has not allowed (allow_judges)"
        if needs.missing_modules:
            return f"it needs Python libraries that are not installed: {', '.join(needs.missing_modules)}"
        if needs.options_problem:
            return needs.options_problem
        shots = 0 if needs.default_fewshot == 0 else num_fewshot if num_fewshot is not None else needs.default_fewshot
        if shots and not needs.has_examples:
            return "it has no few-shot examples (no fewshot_config in its YAML): num_fewshot must be 0"
        return self._data_reason(needs, bool(shots))

    def _needs_of(self, leaf: _Leaf) -> TaskNeeds | str:
        path = leaf.entry.yaml_path if leaf.entry else None
        key = (f"{path}:{leaf.name}", json.dumps(leaf.overrides, sort_keys=True, default=str))
        if key not in self._needs:
            try:
                config = read_config(path, leaf.overrides) if path else leaf.overrides
                self._needs[key] = self._read_needs(leaf.name, config)
            except Exception as error:  # the user's file
                self._needs[key] = f"its YAML cannot be read: {explain(error)}"
        return self._needs[key]

    def _data_reason(self, needs: TaskNeeds, shows_examples: bool) -> str | None:
        if needs.dataset is None:
            return None
        try:
            local = self._roots.find(needs.dataset, needs.config)
        except (PoolError, OSError, ValueError) as error:
            return explain(error)
        if local is None:
            return self._hub.problem(needs.dataset, needs.config, needs.data_files)
        if needs.data_files:
            return None
        for split in (needs.eval_split, needs.fewshot_split if shows_examples else None):
            if split is not None and split not in local.splits:
                return local.lacks(split)
        return None


def _modality_reason(needs: TaskNeeds, modalities: Set[Modality]) -> str | None:
    if "text" not in modalities:
        if needs.modality in ("text", "image", "video"):
            return "it plays no sounds, and the model writes down what it hears"
        if needs.output_type not in ("generate_until", None):
            return f"its output_type is {needs.output_type}, and the model writes down what it hears: generate_until"
        return None
    if needs.modality is None or needs.modality in modalities:
        return None
    taken = " and ".join(_TAKEN[kind] for kind in ("text", "image", "audio") if kind in modalities)
    told = "its config.json, or no processor_config.json, or no torchvision for a family that needs it"
    return f"it {_SHOWN[needs.modality]}, and the model reads {taken} only ({told})"


_SHOWN = {"text": "asks in text", "image": "shows images", "audio": "plays sounds", "video": "shows videos"}
_TAKEN = {"text": "text", "image": "images and videos", "audio": "sounds"}

_GROUP_KEYS = frozenset({"group", "group_alias", "task", "aggregate_metric_list", "metadata", "include"})


def unknown(name: str, index: Collection[str], broken: Mapping[str, str]) -> TaskProblem:
    """There is no such name."""
    unread = "".join(f"; {path} cannot be read: {reason}" for path, reason in list(broken.items())[:3])
    close = close_names(name, index)
    hint = f"; close names: {', '.join(close)}" if close else " (see GET /tasks)"
    return TaskProblem(task=name, reason=f"there is no task, group or tag {name!r}{hint}{unread}", suggestions=close)


def _twice(name: str, leaves: Sequence[_Leaf], sources: dict[str, str]) -> str | None:
    """lm-eval refuses a task that two requested names both contain."""
    for leaf in leaves:
        other = sources.setdefault(leaf.name, leaf.source)
        if other != leaf.source:
            return f"{name} contains the task {leaf.name}, which {other} contains too: request only one of the two"
    return None
