"""Weights that are stored quantised; what is converted is compared where it is loaded (worker/engine)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from gpu_pool.records import ModelArgs
from gpu_pool.weight_files import Tensor
from gpu_pool.weight_types import loaded_bytes

ARGS = ModelArgs(pretrained="")


def bytes_of(name: str, kind: str, method: str | None, device: str = "cuda", dtype: str = "BF16") -> int:
    config: dict[str, Any] = {} if method is None else {"quantization_config": {"quant_method": method}}
    return loaded_bytes(Tensor(name=name, type=kind, shape=(64, 32)), dtype, ARGS, config, device)


@pytest.mark.parametrize(
    ("kind", "method", "device", "expected"),
    [
        ("I32", "gptq", "cuda", 8192),  # as it is stored
        ("F16", "gptq", "cuda", 4096),
        ("F32", "gptq", "cuda", 8192),  # scales stay wide
        ("F8_E4M3", "fp8", "cuda", 2048),
        ("F8_E4M3", "fp8", "cpu", 4096),  # transformers dequantises it there
        ("U8", "bitsandbytes", "cuda", 2048),
        ("I64", None, "cuda", 16384),  # no floating type: not converted
        ("F32", None, "cuda", 4096),
    ],
)
def test_as_stored_unless_it_is_dequantised(kind: str, method: str | None, device: str, expected: int) -> None:
    assert bytes_of("layers.0.mlp.up_proj.weight", kind, method, device) == expected


def test_four_bit_experts_without_their_kernels() -> None:
    dequantised = 4 * 2048  # two weights a byte, each two bytes in bfloat16
    assert bytes_of("mlp.experts.gate_up_proj_blocks", "U8", "mxfp4", "cpu") == dequantised
    on_gpu = bytes_of("mlp.experts.gate_up_proj_blocks", "U8", "mxfp4", "cuda")
    assert on_gpu == (2048 if find_spec("kernels") else dequantised)
    assert bytes_of("mlp.experts.gate_up_proj_scales", "U8", "mxfp4", "cpu") == 2048
