"""What a task's YAML (and the Python beside it) needs, read without importing or downloading anything."""

# pyright: basic
from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.config.task import TaskConfig
from lm_eval.tasks._yaml_loader import load_yaml

from gpu_pool.evaluator.failures import OptionsError
from gpu_pool.evaluator.generation_options import generation_options
from gpu_pool.evaluator.judges import asks_judge
from gpu_pool.evaluator.lmms_options import lmms_generation
from gpu_pool.evaluator.package_files import function_file, is_file, module_file, parsed
from gpu_pool.evaluator.task_modality import lm_eval_modality, lmms_eval_modality
from gpu_pool.gen_kwargs import task_option_problem
from gpu_pool.records import Modality

_KNOWN_KEYS = frozenset(field.name for field in dataclasses.fields(TaskConfig)) | {"group", "task_list", "doc_to_video"}
"""lm-eval's, and ours."""
_CODE_MARKS = ("HF_ALLOW_CODE_EVAL", "code_eval", "UNSAFE_CODE = True")
_LMMS_RUNS_CODE = frozenset({"auxsolidmath", "mathvision", "megabench"})
"""Folders of lmms-eval whose scoring passes the model's text to `eval` or `exec`."""
_LMMS_OUTPUT_TYPES = ("generate_until", "multiple_choice", "loglikelihood")
_PACKAGES_OF_TASKS = ("lm_eval.tasks", "lmms_eval")
"""Whose modules are looked into, too."""


@dataclass(frozen=True)
class TaskNeeds:
    """What one leaf task needs."""

    name: str
    unknown_keys: tuple[str, ...]
    """Keys of the YAML that lm-eval does not know, and refuses."""
    modality: Modality | None
    """What its documents show beside text; None where nothing tells."""
    output_type: str | None
    """As its YAML says."""
    scores: bool
    """Whether it asks for log-likelihoods, as far as its YAML says."""
    runs_code: bool
    asks_judge: bool
    """Whether its scoring asks a model or a service over the network; looked for in lmms-eval's tasks only."""
    missing_modules: tuple[str, ...]
    """Python libraries that its code imports and that are not installed."""
    dataset: str | None
    """Hub id, local folder or file format; None where the task makes its data itself."""
    config: str | None
    data_files: tuple[str, ...]
    has_class: bool
    """Whether it is written in Python, which may choose its documents in its own way."""
    eval_split: str | None
    default_fewshot: int | None
    fewshot_split: str | None
    """Where examples would be drawn from; None where they are written in the task."""
    has_examples: bool
    """Whether it can show any."""
    options_problem: str | None
    """What is wrong with its generation_kwargs, or with the way in which it asks."""


def read_config(path: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """A task's or group's YAML with its includes; functions stay text ("/folder/utils.name")."""
    return load_yaml(path, resolve_func=False) | overrides


def task_needs(name: str, config: dict[str, Any]) -> TaskNeeds:
    """The needs of the task of lm-eval with this configuration."""
    modules = _module_files(config)
    sources = [parsed(path)[0] for path in modules]
    attributes = _class_attributes(config)
    return TaskNeeds(
        name=name,
        unknown_keys=tuple(sorted(set(config) - _KNOWN_KEYS)) if "class" not in config else (),
        modality=lm_eval_modality(config),
        output_type=config.get("output_type"),
        scores="class" not in config and config.get("output_type", "generate_until") != "generate_until",
        runs_code=_runs_code(config, sources),
        asks_judge=False,
        missing_modules=tuple(sorted(set(_missing(modules, whole_file="class" in config)))),
        dataset=None if config.get("custom_dataset") else config.get("dataset_path") or attributes.get("DATASET_PATH"),
        config=config.get("dataset_name") or attributes.get("DATASET_NAME"),
        data_files=tuple(_texts((config.get("dataset_kwargs") or {}).get("data_files"))),
        has_class="class" in config,
        eval_split=config.get("test_split") or config.get("validation_split"),
        default_fewshot=config.get("num_fewshot"),
        fewshot_split=_fewshot_split(config),
        has_examples=True,
        options_problem=_options_problem(config.get("generation_kwargs")) or _mixture_problem(config),
    )


def lmms_task_needs(name: str, config: dict[str, Any]) -> TaskNeeds:
    """The needs of the task of lmms-eval with this configuration."""
    modules = _module_files(config)
    output_type = config.get("output_type") or "generate_until"
    problem = _options_problem(lmms_generation(config.get("generation_kwargs") or {}))
    if output_type not in _LMMS_OUTPUT_TYPES:
        problem = f"its output_type {output_type} is not served; those that are: {', '.join(_LMMS_OUTPUT_TYPES)}"
    return TaskNeeds(
        name=name,
        unknown_keys=(),
        modality=lmms_eval_modality(config),
        output_type=output_type,
        scores=output_type != "generate_until",
        runs_code=any(not _LMMS_RUNS_CODE.isdisjoint(path.parts) for path in modules),
        asks_judge=asks_judge(config),
        missing_modules=tuple(sorted(set(_missing(modules, whole_file=False)))),
        dataset=config.get("dataset_path"),
        config=config.get("dataset_name"),
        data_files=tuple(_texts((config.get("dataset_kwargs") or {}).get("data_files"))),
        has_class="class" in config,
        eval_split=config.get("test_split") or config.get("validation_split"),
        default_fewshot=config.get("num_fewshot"),
        fewshot_split=config.get("fewshot_split"),
        has_examples="class" in config or config.get("fewshot_config") is not None,
        options_problem=problem,
    )


def _options_problem(options: Any) -> str | None:
    if options is None:
        return None
    if problem := task_option_problem(options):
        return problem
    try:
        generation_options(options, None)
    except OptionsError as error:
        return str(error)
    return None


def _mixture_problem(config: dict[str, Any]) -> str | None:
    if config.get("doc_to_image") and config.get("doc_to_video"):
        return "doc_to_image and doc_to_video together do not say which stands where; leave one out"
    return None


def _fewshot_split(config: dict[str, Any]) -> str | None:
    """As `ConfigurableTask.fewshot_docs` chooses it."""
    fewshot = config.get("fewshot_config") or {}
    split = fewshot.get("split", config.get("fewshot_split"))
    if split is None and fewshot.get("samples") is not None:
        return None
    return split or config.get("training_split") or config.get("validation_split") or config.get("test_split")


def _runs_code(config: dict[str, Any], sources: Iterable[str]) -> bool:
    metrics = [item.get("metric") for item in config.get("metric_list") or [] if isinstance(item, dict)]
    flagged = bool(config.get("unsafe_code")) or "code_eval" in metrics
    return flagged or any(mark in source for source in sources for mark in _CODE_MARKS)


def _texts(value: Any) -> Iterator[str]:
    """Every string inside nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# ---------------------------------------------------------------- Python beside the YAML


def _module_files(config: dict[str, Any]) -> list[Path]:
    """Files of the functions (and the class) that the configuration names."""
    named = [function_file(text) for text in _texts(config)]
    return list(dict.fromkeys(found[0] for found in named if found))


def _class_attributes(config: dict[str, Any]) -> dict[str, Any]:
    """Constants of the task class that the configuration names, such as DATASET_PATH."""
    if not isinstance(config.get("class"), str):
        return {}
    stem, _, name = config["class"].rpartition(".")
    path = Path(stem + ".py")
    if not is_file(path):
        return {}
    tree = parsed(path)[1]
    return _constants(name, {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})


def _constants(name: str, classes: dict[str, ast.ClassDef]) -> dict[str, Any]:
    """Constants in the body of a class, and of its bases in the same file."""
    node = classes.get(name)
    if node is None:
        return {}
    constants: dict[str, Any] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            constants |= _constants(base.id, classes)
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant):
            constants |= {target.id: item.value.value for target in item.targets if isinstance(target, ast.Name)}
    return constants


def _missing(files: Iterable[Path], *, whole_file: bool) -> Iterator[str]:
    """Libraries that are imported by `files`, or by what they import of their neighbours, and are not installed."""
    waiting, seen = list(files), set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        tree = parsed(path)[1]
        for module in _imports(ast.walk(tree) if whole_file else _top_level(tree.body)):
            neighbour = _neighbour(module, path.parent)
            if neighbour is not None:
                waiting.append(neighbour)
            elif not _is_installed(module.partition(".")[0]):
                yield module.partition(".")[0]


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that run on import; a `try` that survives a failed import needs nothing."""
    for node in body:
        if isinstance(node, ast.Try):
            if any(isinstance(inner, ast.Raise) for handler in node.handlers for inner in ast.walk(handler)):
                yield from node.body
        else:
            yield node


def _imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            if node.module.startswith(_PACKAGES_OF_TASKS):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _neighbour(module: str, folder: Path) -> Path | None:
    """The file of a module that comes with the tasks, or None."""
    if module.startswith(_PACKAGES_OF_TASKS):
        return module_file(module)
    path = folder / (module.replace(".", "/") + ".py")
    return path if path.is_file() else None


@functools.lru_cache(maxsize=4096)
def _is_installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
