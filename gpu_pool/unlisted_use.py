"""Strangers beside our workers where NVML lists no processes, as in many containers: memory tells. Pure.

What a worker takes while it computes cannot be told from what a stranger takes. While it has nothing to do it takes no
more: what grows then is someone else's. So a stranger who comes while a worker computes and then grows no more is not
seen, and one who was seen is forgotten when a worker has computed meanwhile.
"""

from __future__ import annotations

from gpu_pool.gpu_usage import RETURN_TOLERANCE_BYTES
from gpu_pool.hardware import Gpu


class UnlistedUse:
    """By GPU, the memory that has grown beside workers at rest."""

    def __init__(self) -> None:
        self._least: dict[str, int] = {}
        """Memory in use, the least that was seen since all workers there have been at rest."""
        self._grown: dict[str, int] = {}

    def note(self, gpu: Gpu, *, at_rest: bool) -> int:
        """Take in a look; returns the bytes of strangers. Those seen last, while not all workers are at rest."""
        if gpu.processes:
            self.forget(gpu.uuid)
        elif not at_rest:
            self._least.pop(gpu.uuid, None)
        elif not gpu.problem:
            used = gpu.total_bytes - gpu.free_bytes
            least = self._least[gpu.uuid] = min(used, self._least.get(gpu.uuid, used))
            self._grown[gpu.uuid] = used - least if used - least > RETURN_TOLERANCE_BYTES else 0
        return self._grown.get(gpu.uuid, 0)

    def forget(self, uuid: str) -> None:
        """No worker is there any more, or processes are listed after all."""
        self._least.pop(uuid, None)
        self._grown.pop(uuid, None)
