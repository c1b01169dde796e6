"""Where positions begin to be treated otherwise, and that finding out costs little however far that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from architectures import TREE
from chunks import generating, scoring
from engine_probes import never, watched
from fresh_models import random_model

from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score
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


@pytest.mark.parametrize("length", [40, 200])
def test_answers_do_not_depend_on_what_was_asked_before(length, make):
    """Frequencies that grow with the longest sequence of all forward passes so far."""
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}}
    loaded = make("llama", 256, **dynamic, max_position_embeddings=32, initializer_range=0.2)
    assert loaded.route[0] is Route.PLAIN
    request, prompt = (list(range(3, 43)), [7, 8, 9]), list(range(3, 43))
    options = {"max_gen_toks": 20}

    def answers() -> tuple[object, object]:
        return score(loaded, scoring([request]), never)[0], generate(loaded, generating([prompt], **options), never)[0]

    before = answers()
    longer = [5 + place % 50 for place in range(length)]
    others = [(longer, [4]), request, ([6], [3])]
    together = score(loaded, scoring(others), never)[1]
    texts = generate(loaded, generating([longer, prompt, [6]], **options), never)[1]
    assert (together, texts) == answers() == before
