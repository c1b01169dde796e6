"""Looking at what the engine computes and keeps."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gpu_pool.worker.engine import attention, packed
from gpu_pool.worker.engine.attention import AttentionPlan
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.routes import Route
from gpu_pool.worker.engine.slots import Slots
from gpu_pool.worker.engine.varlen_kernels import VarlenAttention, attend_varlen_plain


def never() -> bool:
    return False


def fresh(loaded: LoadedModel, **limits: int) -> LoadedModel:
    """The same model with an empty prefix cache, and other limits."""
    copy = dataclasses.replace(loaded, limits=dataclasses.replace(loaded.limits, **limits))
    copy.__dict__["route"] = loaded.route
    if loaded.route[0] is Route.TREE:
        copy.__dict__["token_bytes"] = loaded.token_bytes
    return copy


def plainly(loaded: LoadedModel) -> LoadedModel:
    """The same model, computed the plain way."""
    copy = fresh(loaded)
    copy.__dict__["route"] = (Route.PLAIN, "for comparison")
    return copy


def plain_varlen_kernel(query: torch.Tensor, value: torch.Tensor, softcap: float | None) -> VarlenAttention | None:
    """`varlen_kernel` of a GPU, but that the kernel is the plain one, for any device and type."""
    return attend_varlen_plain if softcap is None and query.shape[-1] == value.shape[-1] else None


@contextmanager
def attending_by_lengths() -> Iterator[list[Any]]:
    """Let every batch be attended to as on a GPU meanwhile; yields the kernels that layers were given."""
    chosen: list[Any] = []

    def choose(*tensors: Any) -> VarlenAttention | None:
        chosen.append(plain_varlen_kernel(*tensors))
        return chosen[-1]

    packed.AttentionPlan = functools.partial(AttentionPlan, choose_varlen=choose)
    try:
        yield chosen
    finally:
        packed.AttentionPlan = AttentionPlan


@dataclasses.dataclass
class Passes:
    """Forward passes, by what they were for."""

    read: list[int] = dataclasses.field(default_factory=list)
    """Tokens of each pass over blocks of the tree."""
    continued: list[int] = dataclasses.field(default_factory=list)
    """Rows of each pass that continues rows in slots."""
    plain: list[int] = dataclasses.field(default_factory=list)
    """Tokens of every other pass, padding included."""


@contextmanager
def watched(loaded: LoadedModel) -> Iterator[Passes]:
    """Count what the model computes meanwhile."""
    passes = Passes()

    def count(module: Any, args: Any, kwargs: Any) -> None:
        plan = attention._plan
        kind = passes.plain if plan is None else passes.continued if isinstance(plan, Slots) else passes.read
        kind.append(kwargs["input_ids"].numel())

    hook = loaded.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


@contextmanager
def out_of_memory_beyond(
    loaded: LoadedModel,
    *,
    read: int = 10**9,
    continued: int = 10**9,
    error: type[RuntimeError] = torch.OutOfMemoryError,
    message: str = "CUDA out of memory",
) -> Iterator[list[int]]:
    """Let passes of more tokens or rows than these fail as if the GPU's memory did not suffice; yields their sizes."""

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        most = continued if isinstance(attention._plan, Slots) else read
        if kwargs["input_ids"].numel() > most:
            failures.append(kwargs["input_ids"].numel())
            raise error(message)

    failures: list[int] = []
    hook = loaded.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        yield failures
    finally:
        hook.remove()


def assert_kept_for_the_cache_alone(loaded: LoadedModel) -> None:
    """Every block in the prefix cache has the beginnings that it holds as its users, and no others."""
    users: dict[Any, int] = {}
    for _, path, _ in loaded.prefix_cache._kept.values():
        for block, length in path.sources:
            users[block] = users.get(block, 0) + 1
            assert all(keys.shape[1] >= length for keys, _ in block.keys_values.values())
    assert {block: block.users for block in users} == users


def kept_tensor_bytes(loaded: LoadedModel) -> int:
    """Memory of the prefix cache, without scores, which are in arrays."""
    return loaded.prefix_cache.bytes - sum(scores.nbytes for _, _, scores in loaded.prefix_cache._kept.values())


def tensor_bytes() -> int:
    """Memory of all tensors that Python can reach, without collecting garbage first."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.layout == torch.strided
    }
    return sum(storages.values())
