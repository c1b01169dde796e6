"""Where the files of an installed package lie, and what its Python files say, without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path


@functools.cache
def package_folder(name: str) -> Path | None:
    """The folder of a top-level package; None where it is not installed."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def module_file(module: str) -> Path | None:
    """The file of "package.inner.module", or None where there is none (it may be an attribute of a module)."""
    top, _, rest = module.partition(".")
    folder = package_folder(top)
    if folder is None or not rest:
        return None
    path = folder / rest.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if is_file(file)), None)


def is_file(path: Path) -> bool:
    """Whether it is one; a text that is no path (too long, say) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parsed(path: Path) -> tuple[str, ast.Module]:
    """Text and syntax tree of a Python file, read again when it has changed."""
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2048)
def _parsed(path: Path, _mtime_ns: int) -> tuple[str, ast.Module]:
    text = path.read_text(errors="replace")
    try:
        return text, ast.parse(text)
    except SyntaxError:  # reported when the task is loaded
        return text, ast.Module(body=[], type_ignores=[])


def function_file(text: str) -> tuple[Path, str] | None:
    """File and name of a function that a task's YAML names: "/folder of the YAML/module.name", or a module anywhere."""
    if not text.startswith("/") or "\n" in text:
        return None
    stem, _, name = text.rpartition(".")
    path = Path(stem.removesuffix(".py") + ".py")
    if not name.isidentifier():
        return None
    if is_file(path):
        return path, name
    elsewhere = module_file(stem.rpartition("/")[2])
    return (elsewhere, name) if elsewhere else None
