"""`deterministic: true`: the bits of an answer depend on nothing but its request."""

from __future__ import annotations

import random
from typing import Any

import pytest
from chunks import Request, generating, scoring
from engine_probes import fresh, never
from lm_eval_answers import assert_agree

from gpu_pool.worker.engine import cpu_layers, limits
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score

TYPES = ["llama", "gemma2", "gpt2", "mamba"]


def make_requests(count: int) -> list[Request]:
    """Requests around a shared beginning longer than a block of the grid, some the same but for the last tokens."""
    source = random.Random(1)

    def tokens(low: int, high: int) -> list[int]:
        return [source.randrange(3, 300) for _ in range(source.randint(low, high))]

    shared = tokens(150, 150)
    requests: list[Request] = []
    while len(requests) < count:
        context = source.choice([shared, shared[:128], []]) + tokens(1, 60)
        requests += [(context, tokens(1, 1)), (context, tokens(2, 6))]
    return requests[:count]


def scores(loaded: LoadedModel, requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
    loaded.grid_cache.clear()
    return list(score(loaded, scoring(requests, deterministic=True, **options), never))


@pytest.mark.parametrize("model_type", TYPES)
def test_bits_of_scores(model_type: str, checkpoint: Any, load: Any) -> None:
    loaded, requests = load(checkpoint(model_type)), make_requests(24)
    together = scores(loaded, requests)
    assert scores(loaded, requests[::-1], batch_size=3)[::-1] == together
    assert [scores(loaded, [request])[0] for request in requests[:8]] == together[:8]
    again = score(loaded, scoring(requests[5:], deterministic=True), never)  # with beginnings kept from before
    assert list(again) == together[5:]


@pytest.mark.parametrize("model_type", TYPES)
def test_deterministic_scores_agree_with_the_others(model_type: str, checkpoint: Any, load: Any) -> None:
    loaded, requests = load(checkpoint(model_type)), make_requests(24)
    assert_agree(scores(loaded, requests), score(loaded, scoring(requests), never))


@pytest.mark.parametrize("model_type", TYPES)
def test_texts(model_type: str, checkpoint: Any, load: Any) -> None:
    loaded, prompts = load(checkpoint(model_type)), [context for context, _ in make_requests(12)[::2]]
    options: dict[str, Any] = {"max_gen_toks": 12, "do_sample": True, "kwargs": {"temperature": 0.9}}
    seeds = tuple(range(len(prompts)))
    texts = generate(loaded, generating(prompts, deterministic=True, seeds=seeds, **options), never)
    backwards = generating(prompts[::-1], deterministic=True, seeds=seeds[::-1], **options)
    assert generate(loaded, backwards, never)[::-1] == texts
    assert generate(loaded, generating(prompts, seeds=seeds, **options), never) == texts


def test_requests_beside_long_ones(checkpoint: Any, load: Any) -> None:
    loaded, requests = load(checkpoint("llama")), make_requests(6)
    assert scores(loaded, [*requests, ([3] * 250, [4, 5])])[:6] == scores(loaded, requests)


@pytest.mark.parametrize("model_type", ["llama", "mamba", "t5"])
def test_logits_are_computed_in_the_same_pieces_whatever_the_memory(model_type, checkpoint, load, monkeypatch):
    """Which matrix products the head is computed by is told by their sizes."""
    monkeypatch.setattr(limits, "SCORED_POSITIONS", 60)
    loaded, requests = load(checkpoint(model_type)), [([5, 6], [7 + place % 200 for place in range(150)])]
    sizes: list[int] = []
    head = loaded.model.get_output_embeddings()
    found = []
    for logits_bytes in (4 * loaded.vocabulary * 20, 4 * loaded.vocabulary * 1000):
        copy = fresh(loaded, logits_bytes=logits_bytes)
        assert copy.layers is not None
        sizes.append(-1)
        hook = head.register_forward_hook(lambda module, args, output: sizes.append(output.numel() // output.shape[-1]))
        found.append(scores(copy, requests))
        hook.remove()
    assert found[0] == found[1]
    middle = sizes.index(-1, 1)
    assert sizes[:middle] == sizes[middle:]


@pytest.mark.parametrize("kind", ["scores", "texts"])
def test_layers_are_computed_the_same_whatever_the_memory(kind, checkpoint, load):
    loaded, requests = load(checkpoint("llama")), make_requests(4)
    used: list[bool] = []
    hook = loaded.model.register_forward_pre_hook(lambda module, args: used.append(cpu_layers._are_usual))
    if kind == "scores":
        scores(loaded, requests)
    else:
        generate(loaded, generating([[5, 6]], deterministic=True, max_gen_toks=2), never)
    hook.remove()
    assert used
    assert all(used)
    assert not cpu_layers._are_usual
