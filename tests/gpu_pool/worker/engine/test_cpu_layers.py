"""Linear layers compute what they did before, with weights laid out for oneDNN."""

from __future__ import annotations

import pytest
import torch
from fresh_models import load_fresh
from torch import nn
from transformers import AutoModelForCausalLM

from gpu_pool.worker.engine import cpu_layers
from gpu_pool.worker.engine.cpu_layers import is_usable, laid_out, lay_out_weights

needs_bf16 = pytest.mark.skipif(not is_usable(torch.bfloat16), reason="oneDNN has no bf16 on this CPU")
IDS = torch.arange(5, 19).view(2, 7)


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
def test_logits_stay(name, layers, dtype, checkpoint):
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
@torch.inference_mode()
def test_rows_of_any_number_and_shape(inputs, bias):
    layer = nn.Linear(inputs, 24, bias=bias)
    linear = laid_out(layer.weight, layer.bias)
    for shape in ((), (1,), (0,), (3, 5), (1, 500)):
        rows = torch.randn(*shape, inputs)
        assert linear(rows).shape == (*shape, 24)
        assert torch.allclose(linear(rows), layer(rows), atol=1e-5)
    across = torch.randn(6, 4, inputs).transpose(0, 1)
    assert torch.allclose(linear(across), layer(across), atol=1e-5)


@pytest.mark.parametrize("inputs", [576, 4096])
@torch.inference_mode()
def test_products_in_fp32_are_as_exact_as_the_usual_ones(inputs):
    """What one sum of all terms is not, which would show in log-probabilities."""
    layer, rows = nn.Linear(inputs, 300), torch.randn(50, inputs)
    exact = nn.functional.linear(rows.double(), layer.weight.double(), layer.bias.double())

    def error(linear) -> float:
        return float((linear(rows) - exact).square().mean().sqrt())

    assert error(laid_out(layer.weight, layer.bias)) < 1.25 * error(layer)


def test_models_for_the_cpu_are_loaded_so(checkpoint):
    assert served(load_fresh(checkpoint("llama"), dtype="float32").model) == 15


def test_nothing_is_laid_out_without_memory_for_it(checkpoint, monkeypatch):
    monkeypatch.setattr(cpu_layers, "free_bytes", lambda device: 100_000)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    assert lay_out_weights(model) == served(model) == 0


def test_other_layers_stay_as_they_are():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(8, 8), nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, dtype=torch.float16))
    assert lay_out_weights(model) == served(model) == 0
