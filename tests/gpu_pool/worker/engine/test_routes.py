"""Which way each architecture is computed, and up to which length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from architectures import PLAIN, TREE
from chunks import generating, scoring
from engine_probes import fresh, never, watched

from gpu_pool.worker.computing import compute
from gpu_pool.worker.engine import announcing, attention, self_check
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score, score_chunk
from gpu_pool.worker.engine.rope import rope_boundary
from gpu_pool.worker.engine.routes import Route, choose_route

_CALLS_NO_INTERFACE = {
    **{"bamba": "Bamba", "bloom": "Bloom", "falcon": "Falcon", "falcon_h1": "FalconH1", "falcon_mamba": "FalconMamba"},
    **{"gpt_neo": "GPTNeo", "gptj": "GPTJ", "jamba": "Jamba", "mamba": "Mamba", "mamba2": "Mamba2", "mpt": "Mpt"},
    **{"qwen3_next": "Qwen3Next", "rwkv": "Rwkv", "zamba2": "Zamba2"},
}
REASONS = {
    "granitemoehybrid": "it has layers of other kinds: linear_attention",
    "llama4_text": "it has layers of other kinds: chunked_attention",
    "recurrent_gemma": "it has layers of other kinds: linear_attention",
} | {
    name: f"{family}ForCausalLM does not call transformers' attention interface"
    for name, family in _CALLS_NO_INTERFACE.items()
}


@pytest.mark.parametrize("name", TREE)
def test_tree(name, checkpoint, load):
    route, reason = load(checkpoint(name)).route
    assert route is Route.TREE
    assert reason.startswith("self-check: logits differ by")


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name, checkpoint, load):
    assert load(checkpoint(name)).route == (Route.PLAIN, REASONS[name])


@pytest.mark.parametrize("name", TREE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tree_in_half_precision(name, dtype, checkpoint, load):
    assert load(checkpoint(name), dtype=dtype).route[0] is Route.TREE


def test_rotary_embeddings_that_change_beyond_a_boundary(checkpoint, load):
    """A request within it goes along the tree, whatever else is in the chunk; a longer one the plain way."""
    loaded = load(checkpoint("longrope"))
    assert loaded.route[0] is Route.TREE
    alone = score(loaded, scoring([([7, 8], [9])], deterministic=True), never)
    for length, goes_plainly in ((64, False), (65, True)):
        pairs = [(list(range(5, 5 + length)), [3]), ([7, 8], [9])]
        with watched(loaded) as passes:
            answers = score(loaded, scoring(pairs, deterministic=True), never)
        assert passes.read
        assert bool(passes.plain) is goes_plainly
        assert answers[1:] == alone
        with watched(loaded) as passes:
            generate(loaded, generating([range(5, 1 + length), [7, 8]], max_gen_toks=4), never)
        assert passes.read
        assert bool(passes.plain) is goes_plainly


def test_requests_beyond_a_boundary_are_told_of(checkpoint, load, caplog):
    """To the evaluator with each chunk, in the log once, scored or continued."""
    loaded = fresh(load(checkpoint("longrope")))
    why = "they go beyond the length from which on its rotary embedding changes"
    for length, told in ((63, ""), (65, why), (65, why)):
        prompt = range(5, 5 + length)
        for chunk in (scoring([(prompt, [3]), ([7, 8], [9])]), generating([prompt], max_gen_toks=1)):
            [done] = compute(loaded, chunk, never, lambda: None)
            assert done.plainly == told
    assert [record.message for record in caplog.records if record.name.startswith("gpu_pool.")] == [
        f"some {requests} are computed the plain way: {why}" for requests in ("log-likelihoods", "texts")
    ]


def dynamic_rope(loaded: LoadedModel) -> Iterator[None]:
    settings = loaded.model.config.rope_parameters
    loaded.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    try:
        yield
    finally:
        loaded.model.config.rope_parameters = settings


@pytest.mark.parametrize(("max_length", "boundary"), [(256, None), (512, 256)])
def test_dynamic_rotary_embeddings(max_length, boundary, checkpoint, load):
    loaded = load(checkpoint("llama"), max_length=max_length)
    with contextmanager(dynamic_rope)(loaded):
        assert rope_boundary(loaded) == boundary
        assert (choose_route(loaded)[0] is Route.PLAIN) == (boundary is not None)


def test_a_window_that_is_too_wide_to_check(checkpoint, load, monkeypatch):
    """What reaches beyond it goes the plain way; the self-check is as short as without a window."""
    monkeypatch.setattr(self_check, "_WIDEST_ON_CPU", 15)
    loaded = fresh(load(checkpoint("mistral")))
    with watched(loaded) as passes:
        assert choose_route(loaded)[0] is Route.TREE
    assert max(passes.plain) < 4 * 64
    pairs = [(range(5, 5 + length), [3]) for length in (16, 17)]
    with watched(loaded) as passes:
        found = score_chunk(loaded, scoring(pairs), never)
    assert found.plainly == "they go beyond its window of 16 tokens: to check that would take long"
    assert (sum(passes.read), passes.plain) == (16, [17])


def test_the_self_check_says_that_it_takes_long(checkpoint, load, monkeypatch, capfd):
    monkeypatch.setattr(announcing, "LONG", 64)
    for name, told in (("llama", ""), ("mistral", "engine: checking the tree route on sequences of up to 76 tokens\n")):
        loaded = load(checkpoint(name))
        capfd.readouterr()
        assert choose_route(loaded)[0] is Route.TREE
        assert capfd.readouterr().err == told


@contextmanager
def raising(module: Any, error: Exception) -> Iterator[None]:
    """As a checkpoint's own code does, in the tree's passes alone."""

    def check(module: Any, args: Any, kwargs: Any) -> None:
        if attention._plan is not None:
            raise error

    hook = module.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [AssertionError("one row only"), ImportError("No module named 'x'"), NameError("y")])
def test_whatever_a_models_own_code_raises_means_the_plain_way(error, checkpoint, load):
    loaded = load(checkpoint("llama"))
    with raising(loaded.model.model.layers[0], error):
        assert choose_route(loaded) == (Route.PLAIN, f"the self-check failed: {type(error).__name__}: {error}")
    assert choose_route(loaded)[0] is Route.TREE


def test_a_cancelled_self_check_says_nothing(checkpoint, load):
    loaded = load(checkpoint("llama"))
    with raising(loaded.model, Cancelled()), pytest.raises(Cancelled):
        choose_route(loaded)


def test_model_that_cannot_leave_out_logits(checkpoint, load):
    loaded = load(checkpoint("llama"))
    whole = dataclasses.replace(loaded, forward_names=loaded.forward_names - {"logits_to_keep"})
    assert whole.route == (Route.PLAIN, "its forward cannot leave out logits")
