"""Spawn target of the process that asks an endpoint. Imported by the server too, so nothing heavy at module level."""

from __future__ import annotations

from multiprocessing.connection import Connection

from gpu_pool.child import enter_child
from gpu_pool.messages import ApiWorkerStart


def api_worker_main(connection: Connection, start: ApiWorkerStart, parent_pid: int) -> None:
    """Ask the endpoint that `start` names until the control pipe closes, or says so."""
    enter_child(parent_pid, start.log_path)
    import asyncio

    from gpu_pool.worker.api.serving import serve

    asyncio.run(serve(connection, start))
