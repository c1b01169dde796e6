"""What a stored tensor takes once it is loaded: converted, quantised, dequantised, or shared with another. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from gpu_pool.quantization import quantization_method
from gpu_pool.records import ModelArgs
from gpu_pool.weight_files import TYPE_BITS, Tensor

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "shared.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
_UNQUANTISED = ("embed", "wte.", "wpe.", "shared.weight", "lm_head.", "norm", ".experts.")
"""In names of matrices that bitsandbytes leaves alone: embeddings, the head, and experts, which transformers fuses."""

_WIDE_IN_HALF = {"t5": ".wo.weight", "mt5": ".wo.weight", "umt5": ".wo.weight"}
"""Ends of names, by type of model, that transformers loads in fp32 where float16 is asked for, and never quantises
(`_keep_in_fp32_modules`)."""
_BLOCK = 64
"""Weights that share a scale in 4 bits (bitsandbytes' blocksize)."""
_SCALES_PER_SCALE = 256
"""Scales that share one in turn with double quantisation."""


def once(tensors: Iterable[Tensor], config: dict[str, Any]) -> list[Tensor]:
    """`tensors` without those that share their memory with another once they are loaded."""
    tensors = list(tensors)
    if config.get("tie_word_embeddings") is not True:  # where it is not stated, both tensors of a file count
        return tensors
    embeddings = {tensor.shape for tensor in tensors if tensor.name.endswith(_EMBEDDINGS)}
    return [tensor for tensor in tensors if not (tensor.name.endswith(_HEADS) and tensor.shape in embeddings)]


def loaded_bytes(tensor: Tensor, dtype: str, args: ModelArgs, config: dict[str, Any], device: str) -> int:
    """Memory of `tensor` when the model is loaded in `dtype`, with what `args` and `config` say of quantisation."""
    method = quantization_method(config)
    if method is not None:
        return _as_quantised(tensor, dtype, method, device)
    if not tensor.is_float:
        return tensor.bytes
    wide = tensor.name.endswith(_WIDE_IN_HALF.get(str(config.get("model_type")), "\0"))
    if (args.load_in_8bit or args.load_in_4bit) and not wide and _is_linear(tensor):
        return _by_bitsandbytes(tensor, args)
    bits = TYPE_BITS["F32" if wide and dtype == "F16" else dtype]
    return tensor.elements * bits // 8


def _is_linear(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and not any(mark in tensor.name for mark in _UNQUANTISED)


def _by_bitsandbytes(tensor: Tensor, args: ModelArgs) -> int:
    """int8 with a scale in fp32 for each row; or half a byte with a scale in fp32 for each block of 64.

    With double quantisation those scales are a byte each, with one in fp32 for 256 of them.
    """
    if args.load_in_8bit:
        return tensor.elements + 4 * tensor.shape[0]
    blocks = -(-tensor.elements // _BLOCK)
    scales = blocks + 4 * -(-blocks // _SCALES_PER_SCALE) if args.bnb_4bit_use_double_quant else 4 * blocks
    return -(-tensor.elements // 2) + scales


def _as_quantised(tensor: Tensor, dtype: str, method: str, device: str) -> int:
    """As it is stored, or as the rest of the model where that is wider; dequantised where transformers does that.

    It does so for 8-bit floats on a CPU, and for MXFP4 on a CPU or where its kernels are not installed.
    """
    if tensor.is_float:
        return max(tensor.bytes, tensor.elements * TYPE_BITS[dtype] // 8)
    if method == "fp8" and device == "cpu" and tensor.type.startswith("F8_"):
        return 2 * tensor.bytes
    if method == "mxfp4" and tensor.name.endswith("_blocks") and (device == "cpu" or find_spec("kernels") is None):
        return 4 * tensor.bytes
    return tensor.bytes
