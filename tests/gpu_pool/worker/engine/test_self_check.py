"""Comparing the two ways: a model that the tree route gets wrong is computed plainly, whatever its precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TREE
from chunks import scoring
from engine_probes import never, out_of_memory_beyond, watched
from fresh_models import random_model
from transformers.models.ministral3 import modeling_ministral3

from gpu_pool.worker.engine import attention, self_check
from gpu_pool.worker.engine.attention import AttentionPlan
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.routes import Route, choose_route
from gpu_pool.worker.engine.self_check import compare
from gpu_pool.worker.engine.slots import Slots

Break = Callable[[LoadedModel], Iterator[None]]

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


@contextmanager
def changed(things: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Let each of `things` have that attribute meanwhile."""
    before = [getattr(thing, name) for thing in things]
    for thing in things:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, own in zip(things, before, strict=True):
            setattr(thing, name, own)


@contextmanager
def attending_with(*kinds: type, **told: Callable[[Any], Any]) -> Iterator[None]:
    """Let the tree's attention (of these kinds) understand something else than layers tell it."""

    def misunderstanding(attend: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors, **options: attend(
            *tensors, **{name: told.get(name, lambda same: same)(value) for name, value in options.items()}
        )

    with ExitStack() as stack:
        for kind in kinds or (AttentionPlan, Slots):
            stack.enter_context(changed([kind], "attend", misunderstanding(kind.attend)))
        yield


def layers(loaded: LoadedModel) -> list[Any]:
    return [layer.self_attn for layer in loaded.model.model.layers]


def ignore_sinks(loaded: LoadedModel) -> Iterator[None]:
    strong = torch.nn.Parameter(torch.full_like(layers(loaded)[0].sinks, 2.0))
    with changed(layers(loaded), "sinks", strong), attending_with(sinks=lambda _: None):
        yield


def ignore_the_softcap(loaded: LoadedModel) -> Iterator[None]:
    with changed(layers(loaded), "attn_logit_softcapping", 2.0), attending_with(softcap=lambda _: None):
        yield


def scale_otherwise(loaded: LoadedModel) -> Iterator[None]:
    with attending_with(scale=lambda scale: 1.2 * scale):
        yield


def look_one_token_too_far(loaded: LoadedModel) -> Iterator[None]:
    with attending_with(window=lambda window: window and window + 1):
        yield


def continue_without_the_window(loaded: LoadedModel) -> Iterator[None]:
    """Right for tokens that are read, wrong for those of long sequences that are continued."""
    with attending_with(Slots, window=lambda _: None):
        yield


def count_otherwise_far_on(loaded: LoadedModel) -> Iterator[None]:
    """The tree's queries are not scaled from position 64 on: shorter sequences show nothing of it."""
    scale = modeling_ministral3.get_llama_4_attn_scale

    def scale_near(positions: torch.Tensor, beta: float, length: int) -> torch.Tensor:
        return scale(positions if attention._plan is None else positions % 64, beta, length)

    with changed([modeling_ministral3], "get_llama_4_attn_scale", scale_near):
        yield


BREAKS: list[tuple[str, Break, str]] = [
    ("llama", shift_positions, "logits that differ"),
    ("gemma2", ignore_the_window, "logits that differ"),
    ("gpt_oss", ignore_the_window, "logits that differ"),
    ("llama", mix_positions, "logits that differ"),
    ("llama", attend_without_the_interface, "logits that differ"),
    ("llama", name_no_layer, "CannotAttend"),
    ("gpt_oss", ignore_sinks, "logits that differ"),
    ("gemma2", ignore_the_softcap, "logits that differ"),
    ("llama", scale_otherwise, "logits that differ"),
    ("mistral", look_one_token_too_far, "logits that differ"),
    ("mistral", continue_without_the_window, "logits that differ"),
    ("ministral3", count_otherwise_far_on, "logits that differ"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("name", "breaks", "reason"), BREAKS, ids=lambda value: getattr(value, "__name__", None))
def test_falls_back(name, breaks, reason, dtype, checkpoint, load):
    loaded = dataclasses.replace(load(checkpoint(name), dtype=dtype))
    with contextmanager(breaks)(loaded):
        route, found = loaded.route
        assert route is Route.PLAIN
        assert found.startswith("the self-check")
        assert reason in found
        assert "plain route" in loaded.describe()
        if dtype == "float32":
            assert_right(loaded)
    assert dataclasses.replace(loaded).route[0] is Route.TREE, dataclasses.replace(loaded).route


def assert_right(loaded: LoadedModel) -> None:
    requests = [((5, 6, 7), (8, 9)), ((5, 6, 7), (10,)), (tuple(range(3, 40)), (5, 6))]
    answers = score(loaded, scoring(requests), never)
    for (context, continuation), (value, _) in zip(requests, answers, strict=True):
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0]
        log_probs = logits.log_softmax(-1)[len(context) - 1 : -1]
        wanted = log_probs.gather(1, torch.tensor(continuation)[:, None]).sum()
        assert abs(value - float(wanted)) <= 1e-4 * max(1.0, abs(float(wanted)))


def test_tokens_that_a_model_rules_out_hide_nothing(checkpoint, load):
    """Infinite logits are no measure of how far apart the others may be."""
    loaded = load(checkpoint("llama"))

    def rule_out(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([7]), float("-inf"))

    hook = loaded.model.lm_head.register_forward_hook(rule_out)
    try:
        assert choose_route(loaded)[0] is Route.TREE
        with contextmanager(shift_positions)(loaded):
            assert choose_route(loaded)[0] is Route.PLAIN
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------- what is no mistake

_ENCODER = {name: TREE["llama"][name] for name in ("hidden_size", "num_attention_heads", "initializer_range")}
ALL_WAYS = {"bert": _ENCODER, "electra": _ENCODER}
"""Models whose tokens also see what follows them."""


@pytest.fixture
def make(tiny_model: Path) -> Callable[..., LoadedModel]:
    """`make("llama", dtype=torch.bfloat16, num_hidden_layers=12)`: a random model with settings of its own."""
    return lambda name, dtype=torch.float32, seed=0, **settings: random_model(
        tiny_model, {"model_type": name} | {**TREE, **ALL_WAYS}[name] | settings, dtype, seed
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL_WAYS)
def test_model_whose_tokens_see_what_follows(name, dtype, make):
    loaded = make(name, dtype)
    route, reason = loaded.route
    assert route is Route.PLAIN
    assert reason.startswith("the self-check found that what a sequence is padded with changes its logits by ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_noise_is_no_mistake(name, dtype, make):
    """Rounding in 12 layers: what is allowed grows with it."""
    shallow, deep = (make(name, dtype, initializer_range=0.1, num_hidden_layers=count) for count in (2, 12))
    assert shallow.route[0] is deep.route[0] is Route.TREE
    shares = [found.allowed / found.most for found in (compare(shallow), compare(deep))]
    assert shares[0] < shares[1]


@pytest.mark.parametrize(("share", "unlucky", "trees"), [(0.05, 2, 3), (0.05, 3, 3), (0.2, 1, 1)])
def test_unlucky_trees(share, unlucky, trees, make):
    """An early token of a mixture that rounding sends to another expert changes all that look back at it.

    So another tree decides, unless the difference is more than rounding can explain.
    """
    loaded, right, computed = make("mixtral", torch.float16), self_check._tree_logits, []

    def wrong_at_first(*arguments: Any, **nudged: Any) -> list[torch.Tensor]:
        logits = right(*arguments, **nudged)
        if not nudged:
            computed.append(arguments)
            if len(computed) <= unlucky:
                logits[0] += share * (logits[0].max() - logits[0].min())
        return logits

    with changed([self_check], "_tree_logits", wrong_at_first):
        route, _ = choose_route(loaded)
    assert route is (Route.TREE if unlucky < trees else Route.PLAIN)
    assert len(computed) == trees


@pytest.mark.parametrize(
    ("dtype", "initializer_range", "seed"),
    [(dtype, width, seed) for dtype in ("bfloat16", "float16") for width in (0.02, 0.1, 0.3) for seed in (1, 2)],
)
@pytest.mark.parametrize("name", TREE)
@pytest.mark.exhaustive
def test_every_architecture_in_half_precision(name, dtype, initializer_range, seed, make):
    loaded = make(name, getattr(torch, dtype), seed, initializer_range=initializer_range)
    assert loaded.route[0] is Route.TREE, loaded.route[1]


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.exhaustive)])
def test_a_real_model_in_half_precision(dtype, smollm2, load):
    loaded = load(smollm2, dtype=dtype)
    assert loaded.route[0] is Route.TREE
    found = compare(loaded)
    assert found.difference < 2 * found.rounding < found.most / 2


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
