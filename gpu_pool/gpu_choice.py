"""Which of the GPUs that exist we may use: CUDA_VISIBLE_DEVICES, and the operator's allow- and deny-lists. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gpu_pool.errors import PoolError
from gpu_pool.hardware import Gpu
from gpu_pool.records import Record

_NAME = re.compile(r"(\d+(:\d+)?|(GPU|MIG)-[0-9A-Za-z/-]+)")


class FoundGpu(Record, frozen=True, kw_only=True):
    """A GPU, and the physical GPU that it is or is a part of."""

    gpu: Gpu
    parent_uuid: str


class GpuChoice(Record, frozen=True, kw_only=True):
    """What is asked of a GPU before it is ours to use. A GPU that is not chosen is not shown either."""

    visible_devices: str | None = None
    """An inherited CUDA_VISIBLE_DEVICES; None: every GPU."""
    allow: tuple[str, ...] = ()
    """Positions in PCI order ("0", of a MIG instance "0:1") or beginnings of UUIDs; none: every GPU."""
    deny: tuple[str, ...] = ()
    """The same; these not, even if they are allowed."""

    @classmethod
    def of(cls, visible_devices: str | None, allow: Iterable[str], deny: Iterable[str]) -> GpuChoice:
        """From settings, whose entries may hold several names with commas; raises PoolError, naming the setting."""
        allowed, denied = _split(allow, "allow_gpus"), _split(deny, "deny_gpus")
        return cls(visible_devices=visible_devices, allow=allowed, deny=denied)

    def among(self, found: list[FoundGpu]) -> tuple[Gpu, ...]:
        """Those that may be used, in the order in which they were found."""
        visible = _visible(found, self.visible_devices)
        return tuple(each.gpu for each in visible if self._may_use(each))

    @property
    def may_be_any(self) -> bool:
        """Whether there could be a GPU that may be used: CUDA_VISIBLE_DEVICES names one, as far as names go."""
        return self.visible_devices is None or _NAME.match(self.visible_devices.strip()) is not None

    def _may_use(self, found: FoundGpu) -> bool:
        allowed = not self.allow or any(_means(name, found) for name in self.allow)
        return allowed and not any(_means(name, found) for name in self.deny)

    def unknown(self, found: list[FoundGpu]) -> list[str]:
        """A sentence for each entry of the lists that names no GPU, or the GPUs of several by too short a UUID."""
        sentences: list[str] = []
        for setting, names in (("allow_gpus", self.allow), ("deny_gpus", self.deny)):
            for name in names:
                parents = {each.parent_uuid for each in found if _means(name, each)}
                if len(parents) != 1:
                    what = "names several GPUs" if parents else "names no GPU of this machine"
                    sentences.append(f"{setting}: {name!r} {what}; there are {_known(found)}")
        return sentences

    def why_none(self, found: list[FoundGpu]) -> str:
        """Why `among` returned nothing."""
        if not found:
            return "No GPU can be used: the driver shows none."
        if not _visible(found, self.visible_devices):
            named = f"CUDA_VISIBLE_DEVICES={self.visible_devices!r}"
            return f"No GPU can be used: {named} names none of the {len(found)} that exist."
        return f"No GPU can be used: allow_gpus and deny_gpus leave none of the {len(found)} that exist."


def _split(entries: Iterable[str], setting: str) -> tuple[str, ...]:
    names = tuple(name.strip() for entry in entries for name in entry.split(",") if name.strip())
    for name in names:
        if not _NAME.fullmatch(name):
            raise PoolError(
                f"{setting}: {name!r} is neither a position in PCI order (0, 0:1) nor a UUID (GPU-…, MIG-…)"
            )
    return names


def _visible(found: list[FoundGpu], visible_devices: str | None) -> list[FoundGpu]:
    """Those that CUDA_VISIBLE_DEVICES names; as in CUDA, up to the first name of none or of several."""
    if visible_devices is None:
        return found
    named: set[str] = set()
    for name in visible_devices.split(","):
        matches = [each for each in found if ":" not in name and _means(name.strip(), each)]
        if len({each.parent_uuid for each in matches}) != 1:
            break
        named.update(each.gpu.uuid for each in matches)
    return [each for each in found if each.gpu.uuid in named]


def _means(name: str, found: FoundGpu) -> bool:
    """Whether a name (position, or beginning of a UUID) means this GPU or the one that it is part of."""
    if name.startswith(("GPU-", "MIG-")):
        return found.gpu.uuid.startswith(name) or found.parent_uuid.startswith(name)
    return name in (found.gpu.index, found.gpu.index.partition(":")[0])


def _known(found: list[FoundGpu]) -> str:
    return ", ".join(f"{each.gpu.index} ({each.gpu.uuid})" for each in found) or "none"
