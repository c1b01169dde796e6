"""A file of the GPUs that were seen last: a server that starts while the driver is away waits for those to return."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from gpu_pool.hardware import Gpu

logger = logging.getLogger(__name__)


class KnownGpus:
    """What lasts of GPUs: their identity and size, not who uses them."""

    def __init__(self, path: Path) -> None:
        """The file need not exist. Only one process at a time may `keep`."""
        self._path = path
        self._kept: tuple[Gpu, ...] = ()

    def keep(self, gpus: Iterable[Gpu]) -> None:
        """Write down these in place of the others. What cannot be written is logged and not tried again."""
        lasting = tuple(_lasting(gpu) for gpu in gpus)
        if lasting == self._kept:
            return
        self._kept = lasting
        draft = self._path.with_suffix(".draft")
        try:
            draft.write_bytes(msgspec.json.encode(lasting))
            draft.replace(self._path)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._path, error.strerror)

    def recall(self) -> tuple[Gpu, ...]:
        """Those of the file; none where there is no file, or none of this version."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._path.read_bytes(), type=tuple[Gpu, ...])
        return ()


def _lasting(gpu: Gpu) -> Gpu:
    return Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        name=gpu.name,
        total_bytes=gpu.total_bytes,
        free_bytes=0,
        visible_device=gpu.visible_device,
    )
