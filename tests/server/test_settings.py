"""Where settings come from, which wins, and that wrong ones are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gpu_pool.settings import PoolSettings
from server.settings import FIELD_TYPES, Settings, SettingsError, load_settings


def write(folder: Path, text: str) -> Path:
    path = folder / "evalpool.toml"
    path.write_text(text)
    return path


def test_defaults():
    settings = load_settings({}, None, {})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.pool == PoolSettings(data_dir=Path("evalpool-data").absolute())


def test_precedence(tmp_path: Path):
    config = write(tmp_path, "port = 1\nhost = '0.0.0.0'\ncpu_workers = 3\n")
    environ = {"EVALPOOL_PORT": "2", "EVALPOOL_CPU_WORKERS": "4", "HOME": "/root"}
    settings = load_settings({"port": 5, "host": None}, config, environ)
    assert (settings.host, settings.port, settings.pool.cpu_workers) == ("0.0.0.0", 5, 4)


def test_every_kind_of_value_from_the_file(tmp_path: Path):
    config = write(
        tmp_path,
        """
        data_dir = "data"
        include_paths = ["tasks", "/more/tasks"]
        allow_remote_code = true
        gpu_free_fraction = 0.5
        worker_load_timeout_s = 10
        log_level = "debug"
        [dataset_roots]
        "allenai/ai2_arc" = "/data/arc"
        "baber/piqa" = "piqa/{split}.parquet"
        """,
    )
    pool = load_settings({}, config, {}).pool
    assert pool.data_dir == tmp_path / "data"
    assert pool.include_paths == (tmp_path / "tasks", Path("/more/tasks"))
    assert (pool.allow_remote_code, pool.gpu_free_fraction, pool.worker_load_timeout_s) == (True, 0.5, 10.0)
    assert pool.dataset_roots == {
        "allenai/ai2_arc": "/data/arc",
        "baber/piqa": str(tmp_path / "piqa/{split}.parquet"),
    }


def test_every_kind_of_value_from_the_environment():
    environ = {
        "EVALPOOL_DATA_DIR": "data",
        "EVALPOOL_INCLUDE_PATHS": os.pathsep.join(["a", "/b"]),
        "EVALPOOL_DATASET_ROOTS": '{"allenai/ai2_arc": "/data/arc"}',
        "EVALPOOL_ALLOW_CODE_EXECUTION": "true",
        "EVALPOOL_DROP_TIMEOUT_S": "2.5",
        "EVALPOOL_URL": "http://elsewhere",  # the client's
    }
    pool = load_settings({}, None, environ).pool
    assert pool.data_dir == Path.cwd() / "data"
    assert pool.include_paths == (Path.cwd() / "a", Path("/b"))
    assert pool.dataset_roots == {"allenai/ai2_arc": "/data/arc"}
    assert (pool.allow_code_execution, pool.drop_timeout_s) == (True, 2.5)


def test_every_kind_of_value_from_flags():
    flags = {"data_dir": "~/data", "output_roots": ["/a"], "allow_remote_code": True, "dataset_roots": {"a": "/b"}}
    pool = load_settings(flags, None, {}).pool
    assert pool.data_dir == Path.home() / "data"
    assert (pool.output_roots, pool.allow_remote_code, pool.dataset_roots) == ((Path("/a"),), True, {"a": "/b"})


def test_every_field_of_both_can_be_set():
    assert set(FIELD_TYPES) == {*PoolSettings.__struct_fields__, *Settings.__struct_fields__} - {"pool"}


@pytest.mark.parametrize(
    ("flags", "text", "environ", "words"),
    [
        ({"port": "x"}, "", {}, ["--port", "int"]),
        ({"port": 70000}, "", {}, ["--port", "65535"]),
        ({"cpu_workers": -1}, "", {}, ["--cpu-workers", ">= 0"]),
        ({"log_level": "loud"}, "", {}, ["--log-level", "loud"]),
        ({"data_dir": ""}, "", {}, ["--data-dir", "path"]),
        ({"prot": 1}, "", {}, ["prot", "port"]),
        ({}, "prot = 1", {}, ["evalpool.toml", "prot", "port"]),
        ({}, "port = '1'", {}, ["evalpool.toml", "port", "int"]),
        ({}, "port = ", {}, ["evalpool.toml", "Invalid value"]),
        ({}, "include_paths = 'one'", {}, ["include_paths", "array"]),
        ({}, "pool = 1", {}, ["pool", "no such setting"]),
        ({}, "", {"EVALPOOL_PROT": "1"}, ["EVALPOOL_PROT", "EVALPOOL_PORT"]),
        ({}, "", {"EVALPOOL_PORT": "one"}, ["EVALPOOL_PORT", "int"]),
        ({}, "", {"EVALPOOL_ALLOW_REMOTE_CODE": "maybe"}, ["EVALPOOL_ALLOW_REMOTE_CODE", "bool"]),
        ({}, "", {"EVALPOOL_DATASET_ROOTS": "a=b"}, ["EVALPOOL_DATASET_ROOTS", "JSON"]),
    ],
)
def test_refusals(tmp_path: Path, flags: dict[str, Any], text: str, environ: dict[str, str], words: list[str]):
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, write(tmp_path, text), environ)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"nope\.toml"):
        load_settings({}, tmp_path / "nope.toml", {})
