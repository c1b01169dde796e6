from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_disk

from gpu_pool.results import ResultFiles, plain_metrics, sanitise_model_name

SAMPLE: dict[str, Any] = {
    "doc_id": 0,
    "doc": {"text": "ä", "kind": {1}},
    "target": 2,
    "arguments": [("context", " a"), ("context", {"until": ["\n"]})],
    "resps": [[(-1.5, True)], ["half a character: \udc80"]],
    "filtered_resps": [(-1.5, np.bool_(True)), "x"],
    "acc": np.float32(1.0),
}


def test_names(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path, "/models/a:b")
    results, samples = files.write_results({"a": 1}), files.write_samples("task", [])
    assert files.model_name == sanitise_model_name("/models/a:b") == "__models__a__b"
    assert results.parent == samples.parent == tmp_path / "__models__a__b"
    assert results.name.endswith("_results.json")
    assert samples.name == results.name.replace("_results.json", "_samples_task.jsonl")


def test_jobs_in_one_folder_have_files_of_their_own(tmp_path: Path) -> None:
    paths = {ResultFiles(tmp_path, "m").write_results({"job": i}) for i in range(3)}
    assert sorted(json.loads(path.read_text())["job"] for path in paths) == [0, 1, 2]
    assert set(tmp_path.rglob("*.*")) == paths  # no temporary file stays


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[bytes | None, list[str]]] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        names = [path.name for path in (tmp_path / "m").iterdir()]
        synced.append((opened.read_bytes() if opened.is_file() else None, names))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    path = ResultFiles(tmp_path, "m").write_results({"acc": 1})
    assert synced == [(path.read_bytes(), [f".{path.name}.part"]), (None, [path.name])]


KILLED_ATTEMPT = """
import os, sys
from datetime import datetime
from pathlib import Path
from gpu_pool.results import ResultFiles

files = ResultFiles(Path(sys.argv[1]), "m", datetime.fromisoformat(sys.argv[2]))
files.write_results({"attempt": 1})
files.write_samples("task", (os.kill(os.getpid(), 9) for _ in range(1)))
"""


def test_an_attempt_replaces_what_the_one_before_it_left(tmp_path: Path) -> None:
    submitted_at = datetime(2026, 11, 24, 20, 15, 0, 5, tzinfo=UTC)
    subprocess.run([sys.executable, "-c", KILLED_ATTEMPT, tmp_path, submitted_at.isoformat()], check=False)
    assert len(list(tmp_path.rglob("*.*"))) == 2  # its results and the beginning of its samples
    files = ResultFiles(tmp_path, "m", submitted_at)
    results, samples = files.write_results({"attempt": 2}), files.write_samples("task", [SAMPLE])
    assert set(tmp_path.rglob("*.*")) == {results, samples}
    assert json.loads(results.read_text()) == {"attempt": 2}


def test_samples_are_what_lm_eval_writes(tmp_path: Path) -> None:
    path = ResultFiles(tmp_path, "m").write_samples("task", [SAMPLE])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "doc_id": 0,
            "doc": {"text": "ä", "kind": [1]},
            "target": "2",
            "arguments": {
                "gen_args_0": {"arg_0": "context", "arg_1": " a"},
                "gen_args_1": {"arg_0": "context", "arg_1": {"until": ["\n"]}},
            },
            "resps": [[["-1.5", "True"]], ["half a character: \udc80"]],
            "filtered_resps": [["-1.5", "True"], "x"],
            "acc": 1.0,
        }
    ]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path, "m")
    path = files.write_samples("task", [SAMPLE])
    before = path.read_bytes()

    def broken() -> Any:
        yield SAMPLE
        raise RuntimeError

    try:
        files.write_samples("task", broken())
    except RuntimeError:
        assert path.read_bytes() == before
        assert list(tmp_path.rglob("*.*")) == [path]


def test_a_full_disk_s_error_names_the_file_and_leaves_no_part_of_it(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path, 64 * 1024) as folder:
        files = ResultFiles(folder, "m")
        with pytest.raises(OSError, match=r"No space left on device: '.*_samples_task\.jsonl'"):
            files.write_samples("task", (SAMPLE for _ in range(10_000)))
        assert not [path for path in folder.rglob("*") if path.is_file()]


def test_values_that_json_does_not_know_are_the_same_in_each_process(tmp_path: Path) -> None:
    class Callable:
        def __call__(self) -> None: ...

    path = ResultFiles(tmp_path, "m").write_results(
        {"function": sanitise_model_name, "builtin": len, "object": Callable(), "set": {"b", "c", "a"}, "bit": np.True_}
    )
    found = json.loads(path.read_text())
    assert found.pop("function").startswith("def sanitise_model_name(name: str) -> str:\n")
    assert found.pop("object").startswith("test_values")
    assert found == {"builtin": "len", "set": ["a", "b", "c"], "bit": True}


def test_plain_metrics() -> None:
    metrics = plain_metrics({"acc": np.float64(0.5), "n": np.int64(3), "stderr": "N/A"})
    assert metrics == {"acc": 0.5, "n": 3, "stderr": "N/A"}
    assert {type(value) for value in metrics.values()} == {float, int, str}
