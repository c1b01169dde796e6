"""Logits of one row in pieces: the same answers, with no more of them at once than the limits say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import BIDIRECTIONAL, PLAIN, TREE
from chunks import Request
from engine_probes import fresh, plainly
from lm_eval_answers import answers, assert_agree, lm_eval_answers, make_requests

from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.token_scores import rows_at_once

TYPES = ["t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "m2m_100", "pegasus"]
MOST = 7
LONG: list[Request] = [((5,), tuple(range(6, 206)))]


@pytest.fixture
def sizes_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[LoadedModel, list[Request]], tuple[list[int], list[int]]]:
    """Positions of each call of the model's head, and of each softmax, while it answers these requests."""

    def run(loaded: LoadedModel, requests: list[Request]) -> tuple[list[int], list[int]]:
        heads: list[int] = []
        softmaxes: list[int] = []

        def measured(softmax: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def measure(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                softmaxes.append(logits.numel() // logits.shape[-1])
                return softmax(logits, *args, **kwargs)

            return measure

        for library in (torch, torch.nn.functional):
            monkeypatch.setattr(library, "log_softmax", measured(library.log_softmax))
        hook = loaded.model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: heads.append(output.numel() // output.shape[-1])
        )
        answers(loaded, requests)
        hook.remove()
        return heads, softmaxes

    return run


def bounded(loaded: LoadedModel, positions: int) -> LoadedModel:
    """The same model, with room for so many positions' logits, that has been asked what it needs for that."""
    copy = plainly(fresh(loaded, logits_bytes=4 * loaded.vocabulary * positions))
    assert copy.layers is not None
    assert copy.company if copy.is_encoder_decoder else copy.scoring_company
    return copy


@pytest.mark.parametrize("name", [*TREE, *PLAIN, *BIDIRECTIONAL, *TYPES])
def test_pieces_change_no_answer(name, checkpoint, load, sizes_of):
    loaded = load(checkpoint(name), max_length=64)
    requests = [(context, tuple(continuation) * 3) for context, continuation in make_requests(12, longest=30)]
    assert_agree(answers(bounded(loaded, MOST), requests), answers(plainly(loaded), requests))
    heads, _ = sizes_of(bounded(loaded, MOST), requests)
    assert max(heads) == MOST


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_a_long_document(name, checkpoint, load, reference, sizes_of):
    loaded = bounded(load(checkpoint(name)), 100)
    assert_agree(answers(loaded, LONG), lm_eval_answers(reference(checkpoint(name)), LONG))
    heads, softmaxes = sizes_of(loaded, LONG)
    assert heads == [100, 100]
    assert softmaxes == [64, 36, 64, 36]


def test_the_softmax_is_taken_of_more_at_once_on_a_gpu():
    """Of as many as fill it, within a bound of memory: not of a CPU's few."""
    gpu = torch.device("cuda")
    assert rows_at_once(torch.device("cpu"), 150_000, torch.float32) == 64
    assert rows_at_once(gpu, 150_000, torch.float32) == (1 << 30) // 600_000
    assert rows_at_once(gpu, 150_000, torch.float64) == (1 << 30) // 1_200_000
    assert rows_at_once(gpu, 1 << 30, torch.float32) == 1


@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_the_softmax_is_taken_in_pieces_even_where_all_logits_have_room(name, checkpoint, load, sizes_of):
    heads, softmaxes = sizes_of(bounded(load(checkpoint(name)), 200), LONG)
    assert heads == [200]
    assert softmaxes == [64, 64, 64, 8]


@pytest.mark.parametrize("error", [AssertionError("whole rows only"), NameError("x")])
def test_layers_whose_successors_refuse_a_part(error, checkpoint, load):
    """Whatever error they do it with: then all logits come at once."""
    loaded, requests = plainly(fresh(load(checkpoint("llama")), logits_bytes=1)), make_requests(5)
    widths: list[int] = []

    def check(module: Any, args: Any) -> None:
        widths.append(args[0].shape[1])
        if widths[-1] != widths[0]:
            raise error

    hook = loaded.model.get_output_embeddings().register_forward_pre_hook(check)
    assert loaded.layers is None
    hook.remove()
    assert_agree(answers(loaded, requests), answers(plainly(fresh(loaded, logits_bytes=1 << 30)), requests, 1))


def test_layers_that_cannot_be_told_apart(checkpoint, load):
    """What follows them needs every position: then all logits come at once."""
    loaded = plainly(fresh(load(checkpoint("llama")), logits_bytes=1))

    def centre(module: Any, args: Any, output: Any) -> None:
        output.logits -= output.logits.mean(1, keepdim=True)

    hook = loaded.model.register_forward_hook(centre)
    requests = make_requests(5)
    assert_agree(answers(loaded, requests), answers(plainly(fresh(loaded, logits_bytes=1 << 30)), requests, 1))
    assert loaded.layers is None
    hook.remove()
