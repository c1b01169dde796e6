"""Linear layers compute what they did before, with weights laid out for oneDNN."""

from __future__ import annotations

import itertools

import pytest
import torch
from fresh_models import load_fresh
from torch import nn
from transformers import AutoModelForCausalLM

from gpu_pool.worker.engine import cpu_layers
from gpu_pool.worker.engine.cpu_layers import _Usual, is_usable, laid_out, lay_out_weights, layers_for

needs_bf16 = pytest.mark.skipif(not is_usable(torch.bfloat16), reason="oneDNN has no bf16 on this CPU")
IDS = torch.arange(5, 19).view(2, 7)


@pytest.fixture
def never_usual(monkeypatch):
    """All products in fp32 are computed in slices, on whatever CPU this is."""
    monkeypatch.setattr(cpu_layers, "_usual_for", lambda weight: _Usual(few=False, many=False))


def served(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


def test_the_layout_is_to_be_had():
    assert is_usable(torch.float32)
    assert not is_usable(torch.float64)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", 15),  # in each of two layers q, k, v, o, gate, up, down; and the head
        ("gpt2", 9),  # Conv1D: in each of two layers c_attn, c_proj, c_fc, c_proj; and the head
        ("qwen2", 15),  # with biases
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
@torch.inference_mode()
def test_logits_stay(name, layers, dtype, checkpoint, never_usual):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=dtype).eval()
    for parameter in model.parameters():  # biases are made as zeros
        parameter.add_(torch.randn_like(parameter) * 0.02)
    before = model(IDS).logits
    assert lay_out_weights(model) == served(model) == layers
    after = model(IDS).logits
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert torch.allclose(after, before, rtol=tolerance, atol=tolerance * float(before.abs().max()))


@pytest.mark.parametrize("inputs", [40, 700])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("usual", list(itertools.product([True, False], repeat=2)))
@torch.inference_mode()
def test_rows_of_any_number_and_shape(inputs, bias, usual, monkeypatch):
    monkeypatch.setattr(cpu_layers, "_usual_for", lambda weight: _Usual(*usual))
    layer = nn.Linear(inputs, 24, bias=bias)
    linear = laid_out(layer.weight, layer.bias)
    for shape in ((), (1,), (0,), (3, 5), (1, 500)):
        rows = torch.randn(*shape, inputs)
        assert linear(rows).shape == (*shape, 24)
        assert torch.allclose(linear(rows), layer(rows), atol=1e-5)
    across = torch.randn(6, 4, inputs).transpose(0, 1)
    assert torch.allclose(linear(across), layer(across), atol=1e-5)


@torch.inference_mode()
def test_products_in_slices_and_usual_ones_are_told_apart(never_usual):
    """By bits: what is said of one number of terms holds for larger weights and other rows of that many."""
    for terms in (40, 300, 576, 1536, 1600):
        if cpu_layers._usual_sums_are_alike(terms):
            layer, rows = nn.Linear(terms, 900), torch.randn(700, terms)
            in_slices = [laid_out(layer.weight, layer.bias)(some) for some in rows.split(50)]
            assert torch.equal(torch.cat(in_slices), layer(rows))


@torch.inference_mode()
def test_weights_stay_as_they_are_where_the_usual_call_is_best(monkeypatch):
    monkeypatch.setattr(cpu_layers, "_usual_for", lambda weight: _Usual(few=len(weight) < 100, many=True))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 200))
    assert lay_out_weights(model) == served(model) == 1
    model = model.bfloat16()
    if is_usable(torch.bfloat16):
        assert lay_out_weights(model) == 2


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0)])
def test_the_usual_call_is_taken_where_it_is_faster_and_has_the_same_bits(seconds, alike, monkeypatch):
    monkeypatch.setattr(cpu_layers, "_measure", cpu_layers._measure.__wrapped__)  # what other tests measured stays
    usual, slices = seconds
    monkeypatch.setattr(cpu_layers, "_usual_sums_are_alike", lambda terms: alike)
    is_usual = nn.functional.linear
    monkeypatch.setattr(cpu_layers, "_cpu_seconds", lambda way, rows: usual if way.func is is_usual else slices)
    assert cpu_layers._usual_for(torch.empty(5, 7)) == ((alike and usual < slices,) * 2)


@pytest.mark.parametrize("inputs", [576, 4096])
@torch.inference_mode()
def test_products_in_fp32_are_as_exact_as_the_usual_ones(inputs):
    """What one sum of all terms is not, which would show in log-probabilities."""
    layer, rows = nn.Linear(inputs, 300), torch.randn(50, inputs)
    exact = nn.functional.linear(rows.double(), layer.weight.double(), layer.bias.double())

    def error(linear) -> float:
        return float((linear(rows) - exact).square().mean().sqrt())

    assert error(laid_out(layer.weight, layer.bias)) < 1.25 * error(layer)


@torch.inference_mode()
def test_oneDNN_sees_few_numbers_of_rows():
    """It compiles a kernel for each, and keeps them."""
    layer, seen = nn.Linear(3, 2), set[int]()

    def linear(rows: torch.Tensor) -> torch.Tensor:
        seen.add(rows.numel() // 3)
        return layer(rows)

    for count in range(1100):
        rows = torch.randn(count, 3)
        torch.testing.assert_close(cpu_layers._in_few_sizes(linear, rows), layer(rows))
    assert len(seen) == 1 + 36 + 13  # none at all, up to 256, and more blocks
    rows = torch.randn(2, 35, 3)
    torch.testing.assert_close(cpu_layers._in_few_sizes(linear, rows), layer(rows))


def test_models_for_the_cpu_are_loaded_so(checkpoint, never_usual):
    assert served(load_fresh(checkpoint("llama"), dtype="float32").model) == 15


def test_nothing_is_laid_out_without_memory_for_it(checkpoint, monkeypatch, never_usual, capfd):
    """Which the worker's log says: the model is slower for it."""
    monkeypatch.setattr(cpu_layers, "free_bytes", lambda device: 100_000)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    capfd.readouterr()
    assert lay_out_weights(model) == served(model) == 0
    told = capfd.readouterr().err
    assert told.startswith("engine: linear layers stay as they are, which is slower: ")
    assert "more than the 3e-05 GB to spare" in told


def test_other_layers_stay_as_they_are():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, dtype=torch.float16))
    assert lay_out_weights(model) == served(model) == 0


@torch.inference_mode()
def test_deterministic_requests_do_not_notice_the_layout(never_usual, monkeypatch):
    """A worker that had no memory for it computes the same bits; here, what is laid out is wrong."""
    monkeypatch.setattr(cpu_layers, "is_usable", lambda dtype: True)
    monkeypatch.setattr(cpu_layers, "laid_out", lambda weight, bias: torch.zeros_like)
    layer, rows = nn.Linear(50, 50), torch.randn(3, 50)
    before = layer(rows)
    assert lay_out_weights(nn.Sequential(layer)) == 1
    for deterministic, expected in ((False, torch.zeros(3, 50)), (True, before), (False, torch.zeros(3, 50))):
        with layers_for(deterministic=deterministic):
            assert torch.equal(layer(rows), expected)
