"""What a job leaves behind, without what may differ between two runs of the same evaluation."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from gpu_pool.lasting import ENVIRONMENT_FIELDS, without_volatile

Json = dict[str, Any]


class Outcome(NamedTuple):
    """Of a completed job."""

    metrics: Json
    results: Json
    samples: dict[str, bytes]
    """Task -> its file."""


def outcome(job: Json) -> Outcome:
    """Raises AssertionError when the job has left other files than those that it names."""
    [files] = job["result"].values()
    results, samples = Path(files["results"]), [Path(path) for path in files["samples"]]
    assert sorted(results.parent.iterdir()) == sorted([results, *samples])
    found = {path.name.partition("_samples_")[2]: path.read_bytes() for path in samples}
    return Outcome(job["metrics"], _steady(json.loads(results.read_text())), found)


def _steady(results: Json) -> Json:
    """Without what is volatile; but every run is of one environment."""
    return without_volatile(results) | {name: results[name] for name in ENVIRONMENT_FIELDS if name in results}


def attempts(data_dir: Path, job_id: str) -> list[tuple[int, str | None]]:
    """(number, outcome) of each attempt, in order."""
    with contextlib.closing(sqlite3.connect(data_dir / "jobs.sqlite", timeout=30)) as database:
        return database.execute(
            "SELECT number, outcome FROM attempts WHERE job_id = ? ORDER BY number", (job_id,)
        ).fetchall()


def assert_sound(data_dir: Path) -> None:
    """Every database of the folder is whole."""
    for path in data_dir.rglob("*.sqlite"):
        with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)], path


def read_samples(file: bytes) -> list[Json]:
    """The lines of a samples file."""
    return [json.loads(line) for line in file.splitlines()]
