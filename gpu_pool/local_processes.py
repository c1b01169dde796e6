"""How the pool's processes are started on this machine: what each is told, and where workers listen."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_pool import messages as msg
from gpu_pool.evaluator.entry import evaluator_main
from gpu_pool.fleet import EvaluatorChild, WorkerChild
from gpu_pool.hardware import Slot
from gpu_pool.judge_keys import judge_keys
from gpu_pool.merge import staging_folder
from gpu_pool.merges import MergerChild
from gpu_pool.offspring import hidden
from gpu_pool.records import Merge, ModelSpec
from gpu_pool.settings import PoolSettings
from gpu_pool.supervisor import Child, Received, spawn
from gpu_pool.warden import Warden
from gpu_pool.worker.api.entry import api_worker_main
from gpu_pool.worker.entry import worker_main
from gpu_pool.worker.merging.entry import merger_main

MAX_SOCKET_PATH = 100
"""Longest path of a unix socket that every system accepts, a little rounded."""


class LocalProcesses:
    """Spawns evaluators, desks and workers, once `start`ed; owns the folder of their sockets until `close`."""

    def __init__(self, settings: PoolSettings, visible_device: Callable[[str], str]) -> None:
        """`visible_device(slot_id)`: what CUDA_VISIBLE_DEVICES must say for a GPU."""
        self._settings = settings
        self._visible_device = visible_device
        self._sockets = _socket_folder(settings.data_dir)
        self._secrets = {endpoint.key_env for endpoint in settings.endpoints.values() if endpoint.key_env}
        """Variables of the environment that hold keys of endpoints: each is for the process that asks it alone. And
        those of judges, unless they are allowed."""
        if not settings.allow_judges:
            self._secrets |= judge_keys(os.environ)
        self._warden = Warden(settings.data_dir, self._secrets)

    async def start(self) -> None:
        """End what a lost server's children may have left."""
        with hidden(self._secrets):
            resource_tracker.ensure_running()  # or it would be started with the first child, and inherit what that has
        await self._warden.start()

    def close(self) -> None:
        """All processes have ended: remove their sockets."""
        self._warden.close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    async def desk(self, name: str) -> EvaluatorChild:
        """An evaluator that only answers questions about tasks."""
        return await self.evaluator(name, runs_jobs=False)

    async def evaluator(self, evaluator_id: str, *, runs_jobs: bool = True) -> EvaluatorChild:
        """An evaluator. Raises OSError when it cannot be started."""
        settings = self._settings
        start = msg.EvaluatorStart(
            evaluator_id=evaluator_id,
            data_dir=str(settings.data_dir),
            log_path=self._log_path(evaluator_id),
            include_paths=tuple(str(path) for path in settings.include_paths),
            dataset_roots=settings.dataset_roots,
            allow_code_execution=settings.allow_code_execution,
            allow_judges=settings.allow_judges,
            allow_remote_code=settings.allow_remote_code,
            cache_max_bytes=settings.cache_max_bytes,
            runs_jobs=runs_jobs,
        )
        return await self._spawn(evaluator_id, evaluator_main, start, msg.decode_from_evaluator)

    async def worker(self, worker_id: str, spec: ModelSpec, slots: list[Slot], memory_bytes: int) -> WorkerChild:
        """A worker in these slots, that may take `memory_bytes` of each (0: all). Raises OSError, as above."""
        settings = self._settings
        if spec.api is not None:
            return self._without_socket_once_gone(await self._api_worker(worker_id, spec.api.endpoint))
        start = msg.WorkerStart(
            worker_id=worker_id,
            spec=spec,
            socket_path=self.address(worker_id),
            log_path=self._log_path(worker_id),
            data_dir=str(settings.data_dir),
            visible_devices=",".join(self._visible_device(slot.id) for slot in slots if slot.device == "cuda"),
            tensor_parallel=len(slots),
            memory_bytes=memory_bytes,
            threads=max(1, (os.cpu_count() or 1) // max(1, settings.cpu_workers)),
            allow_remote_code=settings.allow_remote_code,
        )
        return self._without_socket_once_gone(await self._spawn(worker_id, worker_main, start, msg.decode_from_worker))

    def _without_socket_once_gone(self, worker: WorkerChild) -> WorkerChild:
        """It has no time itself to remove its socket, however it ends."""

        def remove(_: object) -> None:
            with contextlib.suppress(OSError):
                os.unlink(self.address(worker.name))

        worker.gone.add_done_callback(remove)
        return worker

    async def _api_worker(self, worker_id: str, name: str) -> WorkerChild:
        """What asks an endpoint: the only process that finds its key."""
        endpoint = self._settings.endpoints[name]
        start = msg.ApiWorkerStart(
            worker_id=worker_id,
            name=name,
            endpoint=endpoint,
            socket_path=self.address(worker_id),
            log_path=self._log_path(worker_id),
        )
        return await self._spawn(worker_id, api_worker_main, start, msg.decode_from_worker, knows=endpoint.key_env)

    async def merger(self, job_id: str, merge: Merge, log_path: Path) -> MergerChild:
        """A process that merges a checkpoint and ends. Raises OSError, as above."""
        start = msg.MergeStart(
            job_id=job_id, merge=merge, staging_path=str(staging_folder(merge, job_id)), log_path=str(log_path)
        )
        return await self._spawn(f"merger of job {job_id}", merger_main, start, msg.decode_from_merger)

    async def _spawn(
        self,
        name: str,
        target: Callable[[Connection, Any, int], None],
        start: Any,
        decode: Callable[[bytes], Received],
        knows: str | None = None,
    ) -> Child[Received]:
        """A child that finds no key in its environment, but for the one in the variable that it `knows`."""
        return await spawn(name, target, start, decode, self._warden.mark, self._secrets - {knows})

    def address(self, worker_id: str) -> str:
        """Where the worker listens for evaluators."""
        return str(self._sockets / f"{worker_id}.sock")

    def _log_path(self, process_id: str) -> str:
        return str(self._settings.data_dir / "logs" / f"{process_id}.log")


def _socket_folder(data_dir: Path) -> Path:
    """An empty private folder for sockets, in the data folder unless its path is too long for one."""
    folder = data_dir / "run"
    if len(os.fsencode(folder)) + len("/worker-1000000.sock") > MAX_SOCKET_PATH:
        return Path(tempfile.mkdtemp(prefix="evalpool-"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder
