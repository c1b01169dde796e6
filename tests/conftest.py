"""What all tests share: real models, real data and real servers. Everything runs offline once it is in the cache."""

from __future__ import annotations

import functools
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads of a busy neighbour cost a factor of ten

import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

import pytest
from evalpool_server import LOCK_FOLDER, Serve, Server, run_server
from fake_nvml import fake_nvml, fake_nvml_library
from hypothesis import HealthCheck, settings
from postgres_server import PostgresServer
from tiny_checkpoints import make_tiny

from gpu_pool import gpu_locks

__all__ = ["fake_nvml", "fake_nvml_library"]

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # its fake GPUs are not those of other processes: neither are their locks
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="evalpool-tests-")
    os.environ[LOCK_FOLDER] = os.path.join(tempfile.tempdir, "evalpool-locks")
    gpu_locks.SHARED_FOLDERS = (Path(tempfile.tempdir),)
    os.chmod(tempfile.tempdir, 0o711)  # a PostgreSQL that root starts runs as another user, who must get through

# a busy machine says nothing about an example
settings.register_profile("evalpool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("evalpool")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests that are marked as exhaustive")


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "exhaustive" in item.keywords:
            item.add_marker(pytest.mark.timeout(7200))
            if not config.getoption("--all"):
                item.add_marker(pytest.mark.skip(reason="exhaustive: runs with --all"))


def _fetch(thing: str) -> Path:
    """What `scripts/fetch_real_data.py` keeps under that name, fetched now when it is not there yet."""
    command = [sys.executable, ROOT / "scripts" / "fetch_real_data.py", thing]
    return Path(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an fp32 checkpoint folder. Do not write into it: it is shared between runs."""
    return _fetch("smollm2")


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """Real benchmark data: a folder a data set, and `dataset_roots.toml` with the setting of that name."""
    return _fetch("benchmarks")


@pytest.fixture(scope="session")
def reference_client_file() -> Path:
    """`client.py` of lmms-eval 0.7.3, unmodified."""
    return _fetch("reference-client")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (hidden 64, 2 layers, fp32, 2,048 positions) with a byte-level tokenizer and a chat template."""
    return make_tiny("model", tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 (width 32, 2 layers, fp32, 512 positions) whose tokenizer, the same, ends every text."""
    return make_tiny("t5", tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture(scope="session")
def sharded_checkpoints(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`tiny_model`, trained a few steps by two FSDP2 ranks, and the moving average of its weights: in one folder saved
    with torch.distributed.checkpoint, in the other with `torch.save` by each rank.

    The files of the folders' names and `.safetensors` have what they answer. Do not write into them.
    """
    distcp, rank_files = (tmp_path_factory.mktemp(name) / "checkpoint-10" for name in ("distcp", "rank-files"))
    # in a process of its own, which spawns the ranks
    script = ROOT / "tests" / "support" / "make_sharded_checkpoint.py"
    subprocess.run([sys.executable, script, tiny_model, distcp, rank_files], check=True, capture_output=True)
    return distcp, rank_files


@pytest.fixture(scope="session")
def distcp_checkpoint(sharded_checkpoints: tuple[Path, Path]) -> Path:
    """The first of them."""
    return sharded_checkpoints[0]


@pytest.fixture(scope="session")
def rank_file_checkpoint(sharded_checkpoints: tuple[Path, Path]) -> Path:
    """The second."""
    return sharded_checkpoints[1]


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a family of models that read images, a random checkpoint, fp32, with a processor and a chat template."""

    @functools.cache
    def make(family: str) -> Path:
        return make_tiny("vlm", family, tmp_path_factory.mktemp(family))

    return make


@pytest.fixture(scope="session")
def tiny_audio(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of a family of models that hear, a random checkpoint, fp32, with its processor."""

    @functools.cache
    def make(family: str) -> Path:
        return make_tiny("audio", family, tmp_path_factory.mktemp(family))

    return make


@pytest.fixture(scope="session")
def postgres() -> Generator[PostgresServer]:
    """A PostgreSQL server of this test run's own."""
    with PostgresServer.started() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A job database that does not exist or is empty yet: a file's path, and a PostgreSQL URL."""
    if request.param == "sqlite":
        return tmp_path / "db" / "jobs.sqlite3"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def serve(tmp_path: Path) -> Generator[Serve]:
    """Start real servers: `serve("--cpu-workers", 2, "--include-path", folder, data_dir=folder)`.

    Those that still run at the end of the test are stopped then, politely, with the assertions of `Server.stop`.
    Without `data_dir` each gets a fresh one.
    """
    with ExitStack() as servers:

        def start(*arguments: object, data_dir: Path | None = None) -> Server:
            folder = data_dir or tmp_path / f"server-{uuid.uuid4().hex}"
            return servers.enter_context(run_server(folder, *arguments))

        yield start
