"""Which way each architecture is computed, and that a model which the tree route gets wrong is computed plainly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from architectures import PLAIN, TREE
from chunks import generating, scoring
from engine_probes import never, out_of_memory_beyond, watched

from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.routes import Route, choose_route, rope_boundary

REASONS = {
    "bloom": "BloomForCausalLM does not call transformers' attention interface",
    "gpt_neo": "GPTNeoForCausalLM does not call transformers' attention interface",
    "llama4_text": "it has layers of other kinds: chunked_attention",
    "mamba": "MambaForCausalLM does not call transformers' attention interface",
    "mpt": "MptForCausalLM does not call transformers' attention interface",
    "recurrent_gemma": "it has layers of other kinds: linear_attention",
    "rwkv": "RwkvForCausalLM does not call transformers' attention interface",
}


@pytest.mark.parametrize("name", TREE)
def test_tree(name, checkpoint, load):
    route, reason = load(checkpoint(name)).route
    assert route is Route.TREE
    assert reason.startswith("self-check: logits differ by")


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name, checkpoint, load):
    assert load(checkpoint(name)).route == (Route.PLAIN, REASONS[name])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mixtral", "deepseek_v3"])
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


def test_model_that_cannot_leave_out_logits(checkpoint, load):
    loaded = load(checkpoint("llama"))
    whole = dataclasses.replace(loaded, forward_names=loaded.forward_names - {"logits_to_keep"})
    assert whole.route == (Route.PLAIN, "its forward cannot leave out logits")


# ------------------------------------------------------------------------- models that the tree route would get wrong


def shift_positions(loaded: LoadedModel) -> Iterator[None]:
    """Positions that are told count for something else than positions in the sequence."""

    def shift(module: Any, args: Any, kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        return args, kwargs if positions is None else {**kwargs, "position_ids": positions // 2}

    hook = loaded.model.register_forward_pre_hook(shift, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def ignore_the_window(loaded: LoadedModel) -> Iterator[None]:
    """A layer that does not tell the attention function of its window; its mask still has it."""
    attention = loaded.model.model.layers[0].self_attn
    window, attention.sliding_window = attention.sliding_window, None
    try:
        yield
    finally:
        attention.sliding_window = window


def mix_positions(loaded: LoadedModel) -> Iterator[None]:
    """A layer that looks at the tokens before, whatever its attention does (as recurrences do)."""
    hook = loaded.model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: (args[0].cumsum(1),))
    try:
        yield
    finally:
        hook.remove()


def attend_without_the_interface(loaded: LoadedModel) -> Iterator[None]:
    """A layer whose attention is its own."""
    attention = loaded.model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **_: (hidden_states.cumsum(1), None)
    try:
        yield
    finally:
        attention.forward = forward


def name_no_layer(loaded: LoadedModel) -> Iterator[None]:
    """A layer that does not know which one it is."""
    attention = loaded.model.model.layers[0].self_attn
    layer = attention.layer_idx
    del attention.layer_idx
    try:
        yield
    finally:
        attention.layer_idx = layer


BREAKS: list[tuple[str, Callable[[LoadedModel], Iterator[None]], str]] = [
    ("llama", shift_positions, "logits that differ"),
    ("gemma2", ignore_the_window, "logits that differ"),
    ("llama", mix_positions, "logits that differ"),
    ("llama", attend_without_the_interface, "logits that differ"),
    ("llama", name_no_layer, "CannotAttend"),
]


@pytest.mark.parametrize(("name", "breaks", "reason"), BREAKS, ids=lambda value: getattr(value, "__name__", None))
def test_self_check_falls_back(name, breaks, reason, checkpoint, load):
    loaded = dataclasses.replace(load(checkpoint(name)))
    requests = [((5, 6, 7), (8, 9)), ((5, 6, 7), (10,)), (tuple(range(3, 40)), (5, 6))]
    with contextmanager(breaks)(loaded):
        route, found = loaded.route
        assert route is Route.PLAIN
        assert found.startswith("the self-check")
        assert reason in found
        assert "plain route" in loaded.describe()
        answers = score(loaded, scoring(requests), never)
        for (context, continuation), (value, _) in zip(requests, answers, strict=True):
            with torch.inference_mode():
                ids = torch.tensor([[*context, *continuation]])
                logits = loaded.model(input_ids=ids, use_cache=False).logits[0]
            log_probs = logits.log_softmax(-1)[len(context) - 1 : -1]
            wanted = log_probs.gather(1, torch.tensor(continuation)[:, None]).sum()
            assert abs(value - float(wanted)) <= 1e-4 * max(1.0, abs(float(wanted)))
    assert dataclasses.replace(loaded).route[0] is Route.TREE


@pytest.mark.parametrize("name", ["llama", "gemma2", "longrope", "mamba"])
def test_self_check_leaves_the_model_as_it_was(name, checkpoint, load):
    loaded = load(checkpoint(name))
    before = loaded.attn_implementation
    choose_route(loaded)
    assert loaded.attn_implementation == before


# ------------------------------------------------------------------------------------------------ too little memory


def test_self_check_does_with_little_memory(checkpoint, load):
    """Nothing larger than its longest sequence fits: what it looks at together, it then looks at in parts."""
    loaded, longest = load(checkpoint("llama")), 60
    with watched(loaded) as passes:
        choose_route(loaded)
    assert min(max(passes.plain), max(passes.read)) > longest
    with watched(loaded) as parts, out_of_memory_beyond(loaded, read=longest):
        route, reason = choose_route(loaded)
    assert route is Route.TREE
    assert reason.startswith("self-check: logits differ by")
    assert len(parts.plain) > len(passes.plain)
    assert len(parts.read) > len(passes.read)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_memory_for_the_self_check(name, checkpoint, load):
    """Not even one of its sequences fits: the model may be one for the tree, but nothing shows it."""
    loaded = load(checkpoint(name))
    with out_of_memory_beyond(loaded, read=40):
        route, reason = choose_route(loaded)
    assert route is Route.PLAIN
    assert reason.startswith("no memory for the self-check's sequences of up to ")
    assert reason.endswith(" tokens, one by one: CUDA out of memory")
    assert choose_route(loaded)[0] is Route.TREE


def test_no_memory_for_a_block_of_the_self_check(checkpoint, load):
    """The plain way has room; the tree's has not."""
    loaded = load(checkpoint("llama"))

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if loaded.attn_implementation != "sdpa":
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(fail, with_kwargs=True)
    assert choose_route(loaded)[1].startswith("no memory for the self-check's sequences of up to 60 tokens")
    hook.remove()
    assert loaded.attn_implementation == "sdpa"
    assert choose_route(loaded)[0] is Route.TREE
