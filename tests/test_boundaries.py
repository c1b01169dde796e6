"""Who may import what: the rules of the house, checked in the source and in real interpreters."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PURE_NAMES = (
    "hardware",
    "history",
    "records",
    "views",
    "endpoints",
    "transitions",
    "losses",
    "events",
    "order",
    "needed",
    "slot_book",
    "ledger",
    "evaluator_count",
    "placement",
    "candidates",
    "moves",
    "heads",
    "room",
    "growth",
    "placer",
    "explain",
    "scheduler",
    "messages",
    "chunk_messages",
    "token_sequences",
)
PURE = {f"gpu_pool.{name}" for name in PURE_NAMES}
HEAVY = {"torch", "transformers", "lm_eval", "datasets"}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(path: Path) -> set[str]:
    """Dotted names that the file imports, anywhere in it."""
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in _imported(node)}


def _imported(node: ast.AST) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            assert node.level == 0, "imports are absolute"
            return [f"{node.module}.{alias.name}" for alias in node.names]
        case _:
            return []


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(("name", "path"), modules("gpu_pool").items())
def test_the_pool_never_imports_the_server(name: str, path: Path) -> None:
    assert "server" not in top(imports(path))


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_import_only_each_other_and_msgspec(name: str) -> None:
    for imported in imports(modules("gpu_pool")[name]):
        package = imported.partition(".")[0]
        within = imported in PURE or imported.rpartition(".")[0] in PURE
        assert within if package == "gpu_pool" else package == "msgspec" or package in sys.stdlib_module_names


@pytest.mark.parametrize(("name", "path"), [*modules("server").items(), *modules("gpu_pool").items()])
def test_heavy_libraries_stay_in_their_processes(name: str, path: Path) -> None:
    if name.startswith("gpu_pool.worker"):
        assert "lm_eval" not in top(imports(path))
    elif name.startswith("gpu_pool.evaluator"):
        assert "torch" not in top(imports(path))
    else:
        assert not HEAVY & top(imports(path))


@pytest.mark.parametrize(
    "name",
    [
        "server.__main__",
        "server.app",
        "server.cli",
        "server.client",
        "gpu_pool.evaluator.entry",
        "gpu_pool.pool",
        "gpu_pool.worker.entry",
    ],
)
def test_importing_what_a_process_starts_with_is_light(name: str) -> None:
    assert not HEAVY & loaded_by(name)


def test_the_command_line_does_not_load_the_server() -> None:
    assert not {"litestar", "uvicorn", "sqlalchemy", "gpu_pool"} & loaded_by("server.cli")


def test_the_client_needs_only_httpx() -> None:
    assert not {"litestar", "msgspec", "gpu_pool", "typer"} & loaded_by("server.client")


def loaded_by(module: str) -> set[str]:
    """Top-level packages that a new interpreter holds after importing `module`."""
    code = f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    return top(set(json.loads(printed)))
