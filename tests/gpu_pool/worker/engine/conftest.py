"""The engine and lm-eval's HF backend on the same checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.loading import LoadedModel, load_model

Load = Callable[..., LoadedModel]
Reference = Callable[..., Any]


@functools.cache
def _load(args: ModelArgs) -> LoadedModel:
    return load_model(ModelSpec(kind="hf", args=args, fingerprint=""), allow_remote_code=False)


@functools.cache
def _reference(pretrained: str, batch_size: int, options: tuple[tuple[str, Any], ...]) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained, device="cpu", batch_size=batch_size, **{"dtype": "float32", **dict(options)})


@pytest.fixture(scope="session")
def load() -> Load:
    """`load(folder, max_length=64)`: our engine's model in fp32."""
    return lambda folder, **args: _load(ModelArgs(pretrained=str(folder), **{"dtype": "float32", **args}))


@pytest.fixture(scope="session")
def reference() -> Reference:
    """`reference(folder, batch_size=1, max_length=64)`: lm-eval's `HFLM` in fp32."""

    def make(folder: Path, batch_size: int = 1, **options: Any) -> Any:
        return _reference(str(folder), batch_size, tuple(options.items()))

    return make
