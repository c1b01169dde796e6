"""The machine that a benchmark ran on, for its table and its JSON; imports neither torch nor transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from gpu_pool.gpus import Inventory

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "lm-eval")
MATRIX_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "sve", "asimd", "bf16", "i8mm")
"""Instruction sets, as /proc/cpuinfo names them, that decide how fast a CPU multiplies matrices in each dtype."""

_GIB = 1024**3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a figure depends on besides the code; `dataclasses.asdict` for JSON, `str` for people."""

    date: str
    """UTC, ISO 8601, to the minute."""
    commit: str
    """Of the repository, with "+" where tracked files differ from it; "unknown" outside one."""
    cpu: str
    instruction_sets: tuple[str, ...]
    cores: int
    """Those that this process may run on."""
    memory_gib: float
    python: str
    packages: dict[str, str]
    """Versions of those of PACKAGES that are installed."""
    gpus: tuple[str, ...]
    """Name and memory of each GPU that NVML shows and CUDA_VISIBLE_DEVICES allows, in PCI order."""

    def __str__(self) -> str:
        instruction_sets = f" ({', '.join(self.instruction_sets)})" if self.instruction_sets else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.packages.items())
        return (
            f"{self.date}, commit {self.commit}\n"
            f"{self.cpu}{instruction_sets}, {self.cores} cores, {self.memory_gib:.1f} GiB; "
            f"GPUs: {', '.join(self.gpus) or 'none'}\n"
            f"Python {self.python}, {versions}"
        )


def describe_machine() -> Machine:
    """This machine, now."""
    cpu_info = _cpu_info()
    flags = (cpu_info.get("flags") or cpu_info.get("Features") or "").split()
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="minutes"),
        commit=_commit(),
        cpu=cpu_info.get("model name") or platform.processor() or platform.machine(),
        instruction_sets=tuple(flag for flag in MATRIX_FLAGS if flag in flags),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB, 1),
        python=platform.python_version(),
        packages=_versions(),
        gpus=_gpus(),
    )


def _cpu_info() -> dict[str, str]:
    """What Linux says of the first processor."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _gpus() -> tuple[str, ...]:
    inventory = Inventory.open()
    try:
        return tuple(f"{gpu.name}, {gpu.total_bytes / _GIB:.0f} GiB" for gpu in inventory.gpus())
    finally:
        inventory.close()
