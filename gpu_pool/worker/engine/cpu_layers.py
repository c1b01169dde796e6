# pyright: basic
"""Linear layers on a CPU: their weights once more, laid out the way that oneDNN's matrix products read them.

The usual call lays them out anew each time, which costs as much as the product when few rows are continued, or leaves
it to a slower kernel. What torch.compile does with frozen weights is done here without compiling anything.

oneDNN sums a product's terms one after another. What that loses in fp32 would be most of what an answer differs by from
other kernels', so these products are summed in slices. Where the usual call, which is MKL's, has the very bits of that,
which of the two computes a product is a matter of speed alone: it is measured, because on one CPU the usual call is as
fast for many rows and small weights, and on another it takes twice the time.

oneDNN compiles kernels for each number of rows, for milliseconds, and keeps a thousand of them, in up to 800 MB. Rows
are therefore computed in numbers of which there are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from time import thread_time
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gpu_pool.worker.engine.announcing import announce
from gpu_pool.worker.engine.limits import free_bytes

_DTYPES = (torch.float32, torch.bfloat16)
_SHARE_OF_FREE = 0.3
"""Of the free memory: keys, values and activations need the rest more."""
_ROWS = 32
"""That the layout is chosen for; it serves any number."""
_TERMS = 192
"""Most terms of a sum in fp32 that are added one after another: as exact as MKL."""
_MANY_ROWS = 256
"""From which on the usual call's own layout costs little beside the product."""
_BLOCK = 64
"""More rows than _MANY_ROWS are computed in a multiple of it, and what is left over apart."""
_TRIES = 8
"""Of either way to compute a product, by turns: neighbours on the machine slow some of them down."""
_MEASURED_OUTPUTS = 2048
"""Of a weight, at most: more take as long each."""

Linear = Callable[[torch.Tensor], torch.Tensor]


class _Usual(NamedTuple):
    """Whether the usual call is to compute a product, which has the bits of slices and is not slower."""

    few: bool
    """For less than _MANY_ROWS rows."""
    many: bool


def lay_out_weights(model: nn.Module) -> int:
    """Make the linear layers of `model` that lie on the CPU use weights in oneDNN's layout; how many now do.

    None does where that layout is not to be had, or the memory for it (as much as the weights take) is not free. The
    layers keep their weights as they are, for whoever reads them, but no longer notice when they change.
    """
    layers: list[tuple[Any, torch.Tensor]] = []
    layers += ((module, weight) for module in model.modules() if (weight := _weight_of(module)) is not None)
    usable = {dtype for dtype in {weight.dtype for _, weight in layers} if is_usable(dtype)}
    served = [(layer, weight) for layer, weight in layers if weight.dtype in usable and not _is_best_as_it_is(weight)]
    wanted, room = sum(weight.nbytes for _, weight in served), _SHARE_OF_FREE * free_bytes(torch.device("cpu"))
    if wanted > room:
        _tell(f"{wanted / 1e9:.2g} GB for a copy in oneDNN's layout are more than the {room / 1e9:.2g} GB to spare")
        return 0
    for layer, weight in served:
        layer.forward = partial(_either, layer.forward, laid_out(weight, layer.bias))
    return len(served)


@contextmanager
def layers_for(*, deterministic: bool) -> Iterator[None]:
    """`deterministic`: let layers compute the usual way meanwhile, whether there was memory to lay them out or not."""
    global _are_usual
    before, _are_usual = _are_usual, deterministic
    try:
        yield
    finally:
        _are_usual = before


_are_usual = False


def _either(usual: Linear, fast: Linear, input: torch.Tensor) -> torch.Tensor:
    return usual(input) if _are_usual else fast(input)


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


def _is_best_as_it_is(weight: torch.Tensor) -> bool:
    return weight.dtype is torch.float32 and all(_usual_for(weight))


def laid_out(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """What computes x @ weight.T + bias, with a copy of `weight` [outputs, inputs]."""
    if weight.dtype is not torch.float32:
        return laid_out_for_one_sum(weight, bias)
    slices = partial(_in_few_sizes, partial(_apply_slices, _slices(weight), bias))
    usual = partial(nn.functional.linear, weight=weight.detach(), bias=bias)
    few, many = (usual if is_usual else slices for is_usual in _usual_for(weight))
    return slices if few is many is slices else partial(_by_rows, few, many)


def laid_out_for_one_sum(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The same with all terms in one sum: the fastest, and in fp32 not exact enough."""
    return partial(_in_few_sizes, partial(_apply, _reordered(weight), bias))


def _slices(weight: torch.Tensor) -> list[torch.Tensor]:
    return [_reordered(part) for part in weight.split(_TERMS, dim=1)]


def _reordered(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)


def _apply(copy: torch.Tensor, bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, copy, bias, "none", [], "")


def _by_rows(few: Linear, many: Linear, input: torch.Tensor) -> torch.Tensor:
    return (many if input.numel() >= _MANY_ROWS * input.shape[-1] else few)(input)


def _in_few_sizes(linear: Linear, input: torch.Tensor) -> torch.Tensor:
    """The same as `linear`, which sees a number of rows of which there are few (`_size`), or a multiple of _BLOCK."""
    rows = input.reshape(-1, input.shape[-1])
    whole = len(rows) // _BLOCK * _BLOCK if len(rows) > _MANY_ROWS else 0
    left_over = len(rows) - whole
    missing = _size(left_over) - left_over
    if left_over == 0 or whole + missing == 0:
        return linear(input)
    last = linear(nn.functional.pad(rows[whole:], (0, 0, 0, missing)))[:left_over]
    result = torch.cat((linear(rows[:whole]), last)) if whole else last
    return result.view(*input.shape[:-1], -1)


def _size(rows: int) -> int:
    """The next one of 1 to 8, 10, 12, 14, 16, 20, 24 … 64, 72, 80 … 128, 144, 160 … 256."""
    step = 1 << max(0, rows.bit_length() - (3 if rows <= _BLOCK else 4))
    return -(-rows // step) * step


def _apply_slices(copies: Sequence[torch.Tensor], bias: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    first, *others = input.split(_TERMS, dim=-1)
    result = _apply(copies[0], bias, first)
    for copy, part in zip(copies[1:], others, strict=True):
        result = torch.ops.mkldnn._linear_pointwise.binary(part, result, copy, None, "add")
    return result


def _usual_for(weight: torch.Tensor) -> _Usual:
    """What products with `weight` [outputs, inputs] in fp32 are computed by."""
    outputs, terms = weight.shape
    alike = _usual_sums_are_alike(terms)
    return _measure(min(outputs, _MEASURED_OUTPUTS), terms) if alike else _Usual(few=False, many=False)


@cache
@torch.inference_mode()
def _usual_sums_are_alike(terms: int) -> bool:
    """Whether the usual products have the bits of those in slices; MKL's have on some CPUs, but for a few rows."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(count, terms, generator=generator) for count in (64, _MANY_ROWS))
    in_slices = partial(_apply_slices, _slices(weight), None)
    return all(torch.equal(in_slices(some), nn.functional.linear(some, weight)) for some in (rows, rows[:8]))


@cache
@torch.inference_mode()
def _measure(outputs: int, terms: int) -> _Usual:
    """By the CPU time of either way on weights of this shape."""
    generator = torch.Generator().manual_seed(0)
    weight, few, many = (torch.randn(count, terms, generator=generator) for count in (outputs, _ROWS, _MANY_ROWS))
    ways = (partial(nn.functional.linear, weight=weight), partial(_apply_slices, _slices(weight), None))
    best: list[bool] = []
    for rows in (few, many):
        tries = [[_cpu_seconds(way, rows) for way in ways] for _ in range(_TRIES)]
        usual, slices = map(min, zip(*tries, strict=True))
        best.append(usual <= slices)
    return _Usual(*best)


def _cpu_seconds(linear: Linear, rows: torch.Tensor) -> float:
    """Of this thread, which waits for the others that compute."""
    started = thread_time()
    linear(rows)
    return thread_time() - started


@torch.inference_mode()
def is_usable(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have the layout, and it computes what the usual call does."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (5, 64)))
    try:
        found = laid_out(weight, None)(rows)
    except (AttributeError, RuntimeError) as error:
        _tell(f"oneDNN's layout of {dtype} is not to be had: {error}")
        return False
    return torch.allclose(found, nn.functional.linear(rows, weight), rtol=0.02, atol=torch.finfo(dtype).eps * 64)


def _tell(why: str) -> None:
    announce(f"linear layers stay as they are, which is slower: {why}")
