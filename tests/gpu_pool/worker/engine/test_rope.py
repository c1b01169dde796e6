"""Where positions begin to be treated otherwise, and that finding out costs little however far that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from architectures import TREE
from engine_probes import watched
from fresh_models import random_model

from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.rope import scaled_from
from gpu_pool.worker.engine.routes import Route, choose_route

_YARN = TREE["ministral3"]["rope_parameters"]


@pytest.fixture
def make(tiny_model: Path) -> Callable[..., LoadedModel]:
    """`make("llama", max_length=64, floor_scale=32)`: a random model with settings of its own."""
    return lambda name, max_length, **settings: random_model(
        tiny_model, {"model_type": name} | TREE[name] | settings, max_length=max_length
    )


@pytest.mark.parametrize(
    ("name", "max_length", "settings", "expected"),
    [
        ("ministral3", 256, {}, [64]),
        ("ministral3", 64, {}, []),
        ("longrope", 256, {}, []),
        ("longrope", 64, {}, []),
        ("llama", 256, {}, []),
        ("llama", 256, {"rope_parameters": _YARN | {"original_max_position_embeddings": 128}}, [128]),
        ("llama", 256, {"floor_scale": 32}, [32]),
    ],
)
def test_positions_scaled_from_some_on(name, max_length, settings, expected, make):
    assert scaled_from(make(name, max_length, **settings)) == expected


def test_far_positions_cost_little(make):
    settings = {"rope_parameters": _YARN | {"original_max_position_embeddings": 32_768, "factor": 4.0}}
    loaded = make("ministral3", max_length=131_072, **settings, max_position_embeddings=131_072)
    with watched(loaded) as passes:
        assert choose_route(loaded)[0] is Route.TREE
    assert sum([*passes.plain, *passes.read, *passes.continued]) < 1000
