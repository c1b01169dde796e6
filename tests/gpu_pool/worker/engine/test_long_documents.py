"""One document of nearly all that a model can see, among short ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from chunks import scoring
from cut_as_sent import Pair, as_sent, trie_size
from engine_probes import never, watched
from fresh_models import random_model

from gpu_pool.evaluator.chunking import MIN_COST
from gpu_pool.worker.engine import attention
from gpu_pool.worker.engine.blocks import Tokens
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.packed import kept_bytes

LONGEST, LONG = 32_768, 30_000
SETTINGS = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedModel:
    return random_model(tiny_model, SETTINGS, max_length=LONGEST)


def requests() -> list[Pair]:
    """Documents of a task with examples, and one of another without, each with four choices of up to 12 tokens."""
    source = random.Random(0)

    def some(count: int) -> Tokens:
        return tuple(source.randrange(3, 300) for _ in range(count))

    examples = some(200)
    documents = [(*examples, *some(30)) for _ in range(60)]
    documents.insert(30, some(LONG))
    return [(document, some(1 + 4 * choice)) for document in documents for choice in range(4)]


@torch.inference_mode()
def alone(loaded: LoadedModel, pair: Pair) -> float:
    """The log-probability by one forward pass of transformers' own, unbatched."""
    context, continuation = pair
    ids = torch.tensor([context + continuation])
    logits = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=len(continuation) + 1).logits[0, :-1].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor([continuation]).T).sum())


@pytest.mark.parametrize("prefix_tokens", [1000, 50_000])
def test_each_token_is_computed_about_once_and_one_path_is_held(loaded, prefix_tokens):
    """However little of the long document the prefix cache may keep; the short ones' examples stay there."""
    cache = loaded.prefix_cache
    cache.clear()
    cache.max_bytes = prefix_tokens * loaded.token_bytes
    pairs = requests()
    held: list[int] = []

    def look(module: object, args: object, kwargs: object) -> None:
        assert attention._plan is not None
        blocks = {source.block for block in attention._plan.starts for source in block.path.sources}
        held.append(sum(map(kept_bytes, blocks)))

    hook = loaded.model.register_forward_pre_hook(look, with_kwargs=True)
    answers: dict[Pair, float] = {}
    with watched(loaded) as passes:
        for chunk in as_sent(pairs, MIN_COST):
            answers |= zip(chunk, (value for value, _ in score(loaded, scoring(chunk), never)), strict=True)
    hook.remove()
    assert not passes.plain
    assert sum(passes.read) <= 1.05 * trie_size(pairs)
    assert max(held) <= (LONG + loaded.limits.scored_tokens) * loaded.token_bytes
    assert cache.bytes <= cache.max_bytes
    short = [pair for pair in pairs if len(pair[0]) < LONG]
    for pair in (*short[::60], *[pair for pair in pairs if len(pair[0]) == LONG][::3]):
        expected = alone(loaded, pair)
        assert abs(answers[pair] - expected) <= 1e-5 * max(1, abs(expected))
