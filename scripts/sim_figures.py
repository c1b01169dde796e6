"""What a run of a trace came to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from sim_traces import Trace
from sim_world import World


def figures(trace: Trace, gpus: int, world: World) -> dict[str, Any]:
    """A row of the table. Times are seconds of the virtual clock, but for those of a decision: CPU time of a step.

    A job waits until its first chunk begins (its scoring, where there is no chunk). Utilisation is GPU time that
    computes over that of all GPUs that could be used, from the first submission to the last end, and while jobs are
    queued; "busy" adds loading.
    """
    records = list(world.jobs.values())
    bound_s = trace.bound_s(gpus)
    makespan_s = max((record.ended_s or 0.0) for record in records)
    waits = sorted(record.started_s - record.trace.arrival_s for record in records if record.started_s is not None) or [
        0.0
    ]
    completed = [record for record in records if record.outcome == "completed"]
    turnarounds = [(record.ended_s or 0.0) - record.trace.arrival_s for record in completed] or [0.0]
    total, waiting = world.meter.total, world.meter.while_waiting
    return {
        "makespan s": makespan_s,
        "makespan / bound": makespan_s / bound_s,
        "without loads": makespan_s / trace.bound_s(gpus, loads=False),
        "mean wait s": statistics.fmean(waits),
        "p99 wait s": percentile(waits, 99),
        "mean turnaround s": statistics.fmean(turnarounds),
        "utilisation": _share(total.computing, total.usable),
        "while work waits": _share(waiting.computing, waiting.usable),
        "busy while work waits": _share(waiting.computing + waiting.loading, waiting.usable),
        "longest wait / bound": waits[-1] / bound_s,
        "ended": "all" if len(completed) == len(records) else f"{len(completed)} completed of {len(records)}",
    }


def decision_figures(world: World) -> dict[str, Any]:
    """CPU time in ms of the decisions that were made while the queue was at least nine tenths of its longest.

    Reports of progress, which are most of the steps, leave nothing to decide, and are not among them.
    """
    queued = -(-world.decisions.most_queued * 9 // 10)
    seconds = world.decisions.seconds(queued)
    return {
        "queued": queued,
        "decisions": len(seconds),
        "median ms": 1e3 * statistics.median(seconds),
        "p99 ms": 1e3 * percentile(seconds, 99),
        "above 1 ms": sum(each > 1e-3 for each in seconds) / len(seconds),
        "max ms": 1e3 * seconds[-1],
    }


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed (nearest rank)."""
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
