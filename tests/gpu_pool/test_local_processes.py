"""Processes as they are started on this machine, and what they leave."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from gpu_pool.endpoints import Endpoint
from gpu_pool.local_processes import LocalProcesses
from gpu_pool.messages import WorkerReady
from gpu_pool.records import ApiModel, ModelArgs, ModelSpec
from gpu_pool.settings import PoolSettings

API = ApiModel(
    endpoint="e",
    base_url="http://127.0.0.1:9",
    kind="chat",
    model="m",
    num_concurrent=1,
    max_retries=0,
    timeout_s=1.0,
)


async def test_a_worker_that_is_gone_leaves_no_socket() -> None:
    with tempfile.TemporaryDirectory(prefix="evalpool-test-") as folder:
        settings = PoolSettings(data_dir=Path(folder), endpoints={"e": Endpoint(base_url=API.base_url)})
        processes = LocalProcesses(settings, lambda slot: slot)
        await processes.start()
        spec = ModelSpec(kind="m", args=ModelArgs(pretrained="m"), fingerprint="f", device="api", api=API)
        worker = await processes.worker("worker-1", spec, [], 0)
        said: asyncio.Queue[Any] = asyncio.Queue()

        async def ignore(_: str) -> None:
            pass

        watching = worker.watch(said.put, ignore)
        async with asyncio.timeout(120):
            assert isinstance(await said.get(), WorkerReady)
            assert Path(processes.address("worker-1")).is_socket()
            worker.kill()
            await watching
        assert not list((Path(folder) / "run").iterdir())
        processes.close()
