# pyright: basic
"""Linear layers on a CPU: their weights once more, laid out the way that oneDNN's matrix products read them.

The usual call lays them out anew each time, which costs as much as the product when few rows are continued, or leaves
it to a slower kernel. What torch.compile does with frozen weights is done here without compiling anything.

oneDNN sums a product's terms one after another. What that loses in fp32 would be most of what an answer differs by from
other kernels', MKL's for one, so these products are summed in slices.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gpu_pool.worker.engine.limits import free_bytes

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)
_SHARE_OF_FREE = 0.3
"""Of the free memory: keys, values and activations need the rest more."""
_ROWS = 32
"""That the layout is chosen for; it serves any number."""
_TERMS = 192
"""Most terms of a sum in fp32 that are added one after another: as exact as MKL."""

Linear = Callable[[torch.Tensor], torch.Tensor]


def lay_out_weights(model: nn.Module) -> int:
    """Make the linear layers of `model` that lie on the CPU use weights in oneDNN's layout; how many now do.

    None does where that layout is not to be had, or the memory for it (as much as the weights take) is not free. The
    layers keep their weights as they are, for whoever reads them, but no longer notice when they change.
    """
    layers: list[tuple[Any, torch.Tensor]] = []
    layers += ((module, weight) for module in model.modules() if (weight := _weight_of(module)) is not None)
    wanted = sum(weight.nbytes for _, weight in layers)
    if wanted > _SHARE_OF_FREE * free_bytes(torch.device("cpu")):
        logger.info("weights stay as they are: %.1f GB more for oneDNN's layout are too many", wanted / 1e9)
        return 0
    usable = {dtype for dtype in {weight.dtype for _, weight in layers} if is_usable(dtype)}
    served = [(layer, weight) for layer, weight in layers if weight.dtype in usable]
    for layer, weight in served:
        layer.forward = laid_out(weight, layer.bias)
    return len(served)


def _weight_of(module: nn.Module) -> Any:
    """The weight [outputs, inputs] of a layer that this is for, else None."""
    if type(module) not in (nn.Linear, Conv1D):  # a subclass may compute something else
        return None
    weight: Any = module.weight
    if type(weight.data) is not torch.Tensor:  # quantised, or a shard of several
        return None
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return None
    return weight.T if type(module) is Conv1D else weight


def laid_out(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """What computes x @ weight.T + bias, with a copy of `weight` [outputs, inputs]."""
    terms = weight.shape[1]
    slices = weight.detach().tensor_split(math.ceil(terms / _TERMS) if weight.dtype is torch.float32 else 1, dim=1)
    copies = [torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), _ROWS) for part in slices]
    if len(copies) == 1:
        return partial(_apply, copies[0], bias)
    return partial(_apply_slices, copies, [part.shape[1] for part in slices], bias)


def _apply(copy: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, copy, bias, "none", [], "")


def _apply_slices(
    copies: Sequence[torch.Tensor], terms: Sequence[int], bias: torch.Tensor | None, input: torch.Tensor
) -> torch.Tensor:
    first, *others = input.split(terms, dim=-1)
    result = _apply(copies[0], bias, first)
    for copy, part in zip(copies[1:], others, strict=True):
        result = torch.ops.mkldnn._linear_pointwise.binary(part, result, copy, None, "add")
    return result


@torch.inference_mode()
def is_usable(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have the layout, and it computes what the usual call does."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (5, 64)))
    try:
        found = laid_out(weight, None)(rows)
    except (AttributeError, RuntimeError) as error:
        logger.info("oneDNN's layout of %s weights is not to be had: %s", dtype, error)
        return False
    return torch.allclose(found, nn.functional.linear(rows, weight), rtol=0.02, atol=torch.finfo(dtype).eps * 64)
