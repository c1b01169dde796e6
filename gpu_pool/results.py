"""Result files of a job: lm-eval's JSON and JSONL, field for field, written atomically and durably.

They lie in `<output folder>/<sanitised model name>/` and carry the job's own date, so jobs that share an output folder
never touch each other's files, and a job that runs again replaces what its lost attempt left.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from gpu_pool.whole_file import sync_folder


def sanitise_model_name(name: str) -> str:
    """A model's name as a folder name, by lm-eval's rule."""
    return re.sub(r'["<>:/|\\?*\[\]]+', "__", name)


def hash_text(text: str) -> str:
    """lm-eval's `hash_string`: sha256 hex of the UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def plain(value: Any) -> Any:
    """What lm-eval's `handle_non_serializable` makes of a value that JSON does not know.

    But the same in each process: sets in order, and functions, which are deep in tasks' configurations, as their
    source, which is how lm-eval writes others, instead of a name with an address in it.
    """
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if isinstance(value, set):
        return sorted(value, key=repr)
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return getattr(value, "__qualname__", type(value).__qualname__)


def plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Scores as they come back from their JSON file: no numpy types, nothing that a message could not carry."""
    return json.loads(json.dumps(metrics, default=plain))


class ResultFiles:
    """The files of one job."""

    def __init__(self, output_dir: Path, model_name: str, submitted_at: datetime | None = None) -> None:
        """`submitted_at` is the date in the files' names; now, when it is not given."""
        self.model_name = sanitise_model_name(model_name)
        self._folder = output_dir / self.model_name
        date = (submitted_at or datetime.now()).astimezone().replace(tzinfo=None)  # local, as lm-eval's
        self._date = date.isoformat().replace(":", "-")

    def write_results(self, results: dict[str, Any]) -> Path:
        """Write the aggregated results (`EvaluationTracker.save_results_aggregated`)."""
        text = json.dumps(results, indent=2, default=plain, ensure_ascii=False)
        return self._write(f"{self._date}_results.json", [text])

    def write_samples(self, task: str, samples: Iterable[dict[str, Any]]) -> Path:
        """Write one task's samples, a line each (`EvaluationTracker.save_results_samples`)."""
        lines = (json.dumps(_loadable(sample), default=plain, ensure_ascii=False) + "\n" for sample in samples)
        return self._write(f"{self._date}_samples_{task.replace('/', '_')}.jsonl", lines)

    def _write(self, name: str, parts: Iterable[str]) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        temporary = path.with_name(f".{name}.part")  # a lost attempt's is written over
        # a lone surrogate (half a character that a model broke off) becomes its JSON escape
        try:
            with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(self._folder)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # on a full disk it would be in the way of everybody
            if isinstance(error, OSError) and error.filename is None:  # as of a write on a full disk
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        return path


def samples_hash(samples: Iterable[dict[str, Any]]) -> str:
    """lm-eval's `task_hashes` entry of a task."""
    return hash_text("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))


def _loadable(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with arguments and responses in the shape that the `datasets` library can load."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(argument)}
        for i, argument in enumerate(sample["arguments"])
    }
    return sample | {
        "resps": _as_text(sample["resps"]),
        "filtered_resps": _as_text(sample["filtered_resps"]),
        "arguments": arguments,
        "target": str(sample["target"]),
    }


def _as_text(value: Any) -> Any:
    """lm-eval's `sanitize_list`: every leaf of nested lists and tuples as a string."""
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_as_text(item) for item in value)
    return str(value)
