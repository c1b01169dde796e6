"""Scripted GPUs for tests: builds fake_nvml.c once and gives each test its own state file.

A process sees the fake GPUs when it is started with `FakeNvml.environment()`, or after `FakeNvml.install`; what it sees
changes with `write`. They can be discovered, not computed on.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pynvml
import pytest
from evalpool_server import LOCK_FOLDER

from gpu_pool import gpu_locks

SOURCE = Path(__file__).with_name("fake_nvml.c")


class FakeNvml:
    """One machine's GPUs, as lines of the language that fake_nvml.c explains."""

    def __init__(self, library_folder: Path, folder: Path) -> None:
        self.library_folder = library_folder
        self.folder = folder
        self.state_path = folder / "nvml-state"
        self.write()

    def write(self, *lines: str) -> None:
        """Replace the whole state at once: no call sees half of it."""
        draft = self.state_path.with_suffix(".draft")
        draft.write_text("".join(f"{line}\n" for line in lines))
        draft.replace(self.state_path)

    @contextmanager
    def holding(self) -> Generator[None]:
        """Workers of `gpu_worker` owe their answers meanwhile, and so keep their jobs running."""
        hold = Path(f"{self.state_path}.hold")
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()

    def variables(self) -> dict[str, str]:
        """What a process needs in its environment: the library, this machine's state, a lock folder of its own."""
        return {
            "LD_LIBRARY_PATH": str(self.library_folder),
            "FAKE_NVML_STATE": str(self.state_path),
            LOCK_FOLDER: str(self.folder / "evalpool-locks"),
        }

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment with the fake GPUs, all of them visible, and `more`."""
        inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        return inherited | self.variables() | more

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let every process that the test starts from now on see the fake GPUs."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in self.variables().items():
            monkeypatch.setenv(name, value)

    def install_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process see the fake GPUs too, whatever NVML it has loaded before."""
        self.install(monkeypatch)
        monkeypatch.setattr(gpu_locks, "SHARED_FOLDERS", (self.folder,))
        library = ctypes.CDLL(str(self.library_folder / "libnvidia-ml.so.1"))
        monkeypatch.setattr(pynvml, "nvmlLib", library)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})


def gpu_line(
    *,
    total_mib: int = 81920,
    used_mib: int = 0,
    utilization: int = 0,
    temperature: int = 30,
    mig: bool = False,
    name: str = "Fake_H100_80GB",
) -> str:
    """The line of one more GPU."""
    return f"gpu {total_mib} {used_mib} {utilization} {temperature} {int(mig)} {name}"


def gpu_uuid(gpu: int) -> str:
    return f"GPU-fa4e0000-0000-4000-8000-{gpu:012d}"


def mig_uuid(gpu: int, position: int) -> str:
    return f"MIG-fa4e0000-0000-5000-8000-{gpu:06d}{position:06d}"


@pytest.fixture(scope="session")
def fake_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built library."""
    folder = tmp_path_factory.mktemp("fake-nvml")
    library = folder / "libnvidia-ml.so.1"
    compiler = shutil.which("gcc") or "cc"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, SOURCE], check=True)
    return folder


@pytest.fixture
def fake_nvml(fake_nvml_library: Path, tmp_path: Path) -> FakeNvml:
    """A machine without GPUs, until the test writes some."""
    return FakeNvml(fake_nvml_library, tmp_path)
