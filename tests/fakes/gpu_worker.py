"""A worker on a GPU of the fake NVML library, which shows it there; its answers are the fake worker's.

It owes its answers for as long as there is a file beside the library's state with ".hold" at the end of its name. With
COMPUTES in the environment, workers on one GPU compute in truth, on the CPU, and only those on several are fakes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from fake_worker import Chunk, FakeWorker, answer
from msgspec.structs import replace

from gpu_pool import messages as msg
from gpu_pool.child import enter_child
from gpu_pool.worker import entry

COMPUTES = "FAKE_GPUS_COMPUTE"
USED_MIB = 20480
"""On each of its GPUs."""
POLL_SECONDS = 0.01


def gpu_worker_main(connection: Connection, start: msg.WorkerStart, parent_pid: int) -> NoReturn:
    """Stands in for `worker_main`, on a CPU too. Its description says which GPUs CUDA would have."""
    gpus = [_number(name) for name in start.visible_devices.split(",") if name]
    _occupy(gpus)
    if len(gpus) == 1 and COMPUTES in os.environ:
        on_cpu = replace(start, spec=replace(start.spec, device="cpu"), visible_devices="")
        entry.worker_main(connection, on_cpu, parent_pid)
    enter_child(parent_pid, start.log_path)
    visible = entry._environment(start)["CUDA_VISIBLE_DEVICES"]
    FakeWorker(start.worker_id, Path(start.socket_path), _answer)
    description = f"CUDA_VISIBLE_DEVICES={visible}"
    memory_bytes = len(gpus) * USED_MIB << 20
    connection.send_bytes(msg.encode(msg.WorkerReady(memory_bytes=memory_bytes, description=description)))
    while not isinstance(message := msg.decode_to_worker(connection.recv_bytes()), msg.Shutdown):
        said = msg.Alive() if isinstance(message, msg.Ping) else msg.Dropped(job_id=message.job_id)
        connection.send_bytes(msg.encode(said))
    sys.exit()


def _answer(worker: FakeWorker, chunk: Chunk) -> msg.Message:
    while os.path.exists(_beside("hold")):
        time.sleep(POLL_SECONDS)
    return answer(worker, chunk)


def _number(visible_device: str) -> int:
    """The GPU that is named so: by its number, or by a UUID, which ends with it. No MIG instances."""
    return int(visible_device.rpartition("-")[2])


def _occupy(gpus: Iterable[int]) -> None:
    lines = "".join(f"live {gpu} {os.getpid()} {USED_MIB}\n" for gpu in gpus)
    file = os.open(_beside("live"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, lines.encode())
    os.close(file)


def _beside(kind: str) -> str:
    return f"{os.environ['FAKE_NVML_STATE']}.{kind}"
