"""Where our engine's time goes in a workload of bench_engine: by kinds of operators, from torch's profiler."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise", "mkl_linear"),
    "attention": ("_scaled_dot_product",),
    "log-probabilities": ("_log_softmax", "logsumexp", "argmax", "max", "amax"),
    "copies and look-ups": (
        "copy_",
        "index",
        "_index_put_impl_",
        "index_select",
        "gather",
        "cat",
        "clone",
        "embedding",
    ),
}
"""Of operators, the beginnings of their names."""
OTHERS, OUTSIDE = "other operators", "Python, tokenising"


def profiled(call: Callable[[], object]) -> dict[str, float]:
    """Shares of the call's time, in per cent, by kind; what no operator accounts for is OUTSIDE.

    Operators' times are wall-clock time: on a machine that computes something else, too, all grow about alike.
    """
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    seconds = time.perf_counter() - began
    shares: Counter[str] = Counter()
    for event in found.key_averages():
        shares[_kind_of(event.key)] += event.self_cpu_time_total / 1e6
    shares[OUTSIDE] = max(0.0, seconds - shares.total())
    return {kind: 100 * shares[kind] / shares.total() for kind in (*KINDS, OTHERS, OUTSIDE)}


def _kind_of(operator: str) -> str:
    name = operator.rpartition("::")[2]
    for kind, beginnings in KINDS.items():
        if any(name == beginning or name.startswith(beginning + "_") for beginning in beginnings):
            return kind
    return OTHERS
