"""A file system so small that a test can fill it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, size: int, files: int = 0) -> Generator[Path]:
    """A tmpfs of `size` bytes at `folder`, which exists, for so many files and folders, itself among them (0: any
    number); skips the test where this user may not mount."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={files}", "tmpfs", folder]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        pytest.skip(f"this user may not mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Generator[None]:
    """Nothing more can be written to that file system meanwhile."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    try:
        yield
    finally:
        filler.unlink()
