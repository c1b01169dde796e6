"""Whether a task's scoring asks a judge, another model behind somebody's endpoint: read from its Python, not run.

From the functions that a YAML names for scoring, all is followed that they mention by name, in their file and in those
of its neighbours. What is asked in a way that no name shows (through an object that is handed around) is not found.
"""

# pyright: basic
from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_pool.evaluator.package_files import function_file, module_file, parsed

_CLIENTS = ("openai", "anthropic", "google.generativeai", "lmms_eval.llm_judge", "lmms_eval.verifiers.openai")
"""Modules that ask judges."""
_OUTSIDE = "lmms_eval."
_SCORING = ("process_results", "metric_list", "filter_list", "class")
"""Keys of a YAML that name what scores; the others ask the model."""


def asks_judge(config: Mapping[str, Any]) -> bool:
    """Whether scoring mentions what asks a judge; the configuration's functions are text ("/folder/utils.name")."""
    named = [function_file(text) for key in _SCORING for text in _texts(config.get(key))]
    waiting, seen = [found for found in named if found], set[tuple[Path, str]]()
    while waiting:
        path, name = waiting.pop()
        if (path, name) in seen:
            continue
        seen.add((path, name))
        tree = parsed(path)[1]
        places = dict(_imported(tree.body))
        for statement in _defining(tree.body, name):
            inner = places | dict(_imported(ast.walk(statement)))
            for mentioned in _mentioned(statement):
                if mentioned not in inner:
                    waiting.append((path, mentioned))
                    continue
                module, attribute = inner[mentioned]
                if _is_client(module) or (module == "requests" and _posts(statement)):
                    return True
                if neighbour := _file(module, path.parent):
                    waiting.append((neighbour, attribute))
                elif whole := _file(f"{module}.{attribute}", path.parent):
                    waiting += [(whole, used) for used in _attributes(statement, mentioned)]
    return False


def _is_client(module: str) -> bool:
    return any(module == client or module.startswith(client + ".") for client in _CLIENTS)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _imported(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names that imports bind -> module, and attribute of it ("" for the module itself)."""
    for node in nodes:
        if isinstance(node, ast.Try):
            yield from _imported(node.body)
        elif isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.partition(".")[0], (alias.name, "")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, (node.module, alias.name)) for alias in node.names)


def _defining(body: Iterable[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """Statements at the top of a file that define or assign that name."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name:
                yield node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _defining([inner for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.stmt)], name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(inner, ast.Name) and inner.id == name for each in targets for inner in ast.walk(each)):
                yield node


def _mentioned(statement: ast.stmt) -> set[str]:
    """Names that it reads."""
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _attributes(statement: ast.stmt, name: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(statement)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def _posts(statement: ast.stmt) -> bool:
    return "post" in _attributes(statement, "requests")


def _file(module: str, folder: Path) -> Path | None:
    """The file of a module that comes with the tasks."""
    if module.startswith(_OUTSIDE):
        return module_file(module)
    path = folder / (module.replace(".", "/") + ".py")
    return path if path.is_file() else None
