"""Two GPUs that a test scripts, leases on them, and a box that can start no more threads."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest
from fake_nvml import FakeNvml
from two_gpus import TWO, make_leases

from gpu_pool.leases import Leases


@pytest.fixture
def nvml(fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Two GPUs of 80 GiB, of which the driver has one."""
    fake_nvml.install_here(monkeypatch)
    monkeypatch.setattr("gpu_pool.leases.RETURN_POLL_SECONDS", 0.01)
    fake_nvml.write(*TWO)
    return fake_nvml


@pytest.fixture
def leases(nvml: FakeNvml) -> Leases:
    return make_leases()


@pytest.fixture
def no_more_threads() -> Generator[None]:
    """None can be started meanwhile: there is no room for its stack."""
    size = threading.stack_size(1 << 47)
    yield
    threading.stack_size(size)
