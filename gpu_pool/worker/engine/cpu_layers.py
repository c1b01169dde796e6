# pyright: basic
"""Linear layers on a CPU: their weights once more, laid out the way that oneDNN's matrix products read them.

The usual call lays them out anew each time, which costs as much as the product when few rows are continued, or leaves
it to a slower kernel. What torch.compile does with frozen weights is done here without compiling anything.

oneDNN sums a product's terms one after another. In fp32 what that loses in the logits would be most of what an answer
differs by from other kernels', so the logits' products are summed in slices.
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
_SLICE = 256
"""Most terms of a logit in fp32 that are summed one after another: as exact as MKL, and a tenth slower than in one."""
_ROWS_AT_ONCE = 64
"""Of logits in slices: what the slices come to should stay in the cache until it is added up."""

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
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for layer, weight in served:
        is_sliced = layer is head and weight.dtype is torch.float32
        layer.forward = laid_out_in_slices(weight, layer.bias) if is_sliced else laid_out(weight, layer.bias)
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
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
    return partial(_apply, copy, bias)


def laid_out_in_slices(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The same, with sums of at most _SLICE terms that are added up at the end."""
    slices = weight.tensor_split(math.ceil(weight.shape[1] / _SLICE), dim=1)
    first, *others = [laid_out(some, None if index else bias) for index, some in enumerate(slices)]
    bounds = torch.tensor([some.shape[1] for some in slices]).cumsum(0)[:-1].tolist()
    return partial(_apply_slices, first, others, bounds, weight.shape[0])


def _apply_slices(
    first: Linear, others: Sequence[Linear], bounds: Sequence[int], outputs: int, input: torch.Tensor
) -> torch.Tensor:
    rows = input.reshape(-1, input.shape[-1])
    result = input.new_empty(len(rows), outputs)
    for some, into in zip(rows.split(_ROWS_AT_ONCE), result.split(_ROWS_AT_ONCE), strict=True):
        parts = some.tensor_split(bounds, dim=1)
        into.copy_(first(parts[0]))
        for product, part in zip(others, parts[1:], strict=True):
            into += product(part)
    return result.view(*input.shape[:-1], outputs)


def _apply(copy: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, copy, bias, "none", [], "")


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
