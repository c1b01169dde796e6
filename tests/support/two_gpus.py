"""Leases on two GPUs of the fake NVML library, and short words for what tests ask of them.

The fixtures `nvml` and `leases` are in tests/gpu_pool/conftest.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fake_nvml import gpu_line, gpu_uuid

from gpu_pool.gpu_locks import GpuLock, default_folder
from gpu_pool.gpus import Inventory
from gpu_pool.leases import Leases
from gpu_pool.process_table import ProcessTable
from gpu_pool.settings import PoolSettings
from gpu_pool.views import GpuView

GIB = 1024**3
UUID = [gpu_uuid(n) for n in range(2)]
TWO = (gpu_line(used_mib=1024), gpu_line(used_mib=1024))
STRANGER = 2**22 + 77  # no process here can have this number
PROCESSES = "nvmlDeviceGetComputeRunningProcesses_v3"


def make_leases(*, in_container: bool = False, **settings: object) -> Leases:
    folder = default_folder().parent  # of the test's own, see FakeNvml.install_here
    values = PoolSettings(**{"data_dir": folder, "cpu_workers": 1, "gpu_return_timeout_s": 0.2} | settings)
    return Leases(values, Inventory.open({}), ProcessTable(in_container=in_container))


async def reasons(leases: Leases) -> dict[str, str | None]:
    return {slot.id: reason for slot, reason in await leases.look()}


async def view(leases: Leases, gpu: int = 0) -> GpuView:
    return (await leases.views())[gpu]


@contextmanager
def worker(leases: Leases, worker_id: str = "worker-1") -> Iterator[int]:
    """A process in a session of its own, of which the leases know as that worker's; its pid."""
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True) as process:
        leases.started(worker_id, process.pid)
        yield process.pid
        process.kill()


def locked(gpu: int) -> bool:
    """Whether another server would find the GPU's lock held."""
    lock = GpuLock(UUID[gpu])
    taken = lock.acquire()
    lock.release()
    return not taken
