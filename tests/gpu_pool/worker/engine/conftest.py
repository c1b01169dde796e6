"""The engine and lm-eval's HF backend on the same checkpoint."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fresh_models import load_fresh

from gpu_pool.worker.engine import sharing
from gpu_pool.worker.engine.loaded_model import LoadedModel

Load = Callable[..., LoadedModel]
Reference = Callable[..., Any]


_load = functools.cache(load_fresh)


@functools.cache
def _reference(pretrained: str, batch_size: int, options: tuple[tuple[str, Any], ...]) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained, device="cpu", batch_size=batch_size, **{"dtype": "float32", **dict(options)})


@pytest.fixture(scope="session")
def load() -> Load:
    """`load(folder, max_length=64)`: our engine's model in fp32."""
    return lambda folder, **args: _load(folder, **{"dtype": "float32", **args})


@pytest.fixture(scope="session")
def reference() -> Reference:
    """`reference(folder, batch_size=1, max_length=64)`: lm-eval's `HFLM` in fp32."""

    def make(folder: Path, batch_size: int = 1, **options: Any) -> Any:
        return _reference(str(folder), batch_size, tuple(options.items()))

    return make


@pytest.fixture
def copied(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


@pytest.fixture(autouse=True)
def share_as_long_prompts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts of tests are short: what they share would all be copied."""
    monkeypatch.setattr(sharing, "LEAST_SAVED", 32)
