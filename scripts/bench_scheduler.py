"""The scheduler under a virtual clock: real decisions, simulated processes, beside two simpler schedulers.

gpu_pool.scheduler.Scheduler takes the events of a simulated box (sim_world.py) over random traces in --patterns, and
over the traces of --trace, which record_trace.py makes from the data folder of a real server. "FIFO, always loads"
gives the next job any free GPUs and loads its model anew; "one at a time" does so with one job on the box at a time, as
the reference does.

The bound of a trace is a time before which no schedule could have ended it: the larger of all work, each model loaded
once, divided by the GPUs, and of the longest job's critical path, arrivals considered (sim_traces.py). Columns are
explained in sim_figures.py. --history lets that many short jobs, each on a model of its own, pass through our scheduler
before: what it remembers of them must not slow it down. --longest-first gives every job its length as its priority,
which no scheduler can know: how much of what the makespan is above the bound comes from not knowing it.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import describe_machine
from report import print_report
from sim_baselines import Fifo, OneAtATime
from sim_figures import decision_figures, figures
from sim_random_traces import PATTERNS, after_history, random_trace
from sim_traces import Trace, read_trace
from sim_world import Fault, Steps, World

from gpu_pool.scheduler import Scheduler

MAX_ATTEMPTS = 3
LOST_SECONDS = 600.0
"""How long a GPU that --faults takes away is gone."""
LOST_SHARE = 0.1
"""Of faults that take the GPU away; the others only end its worker."""

OURS = "evalpool"
Row = dict[str, Any]


def main() -> int:
    """0 when every trace ran to its end; what a scheduler does wrong raises."""
    arguments = parse_arguments()
    machine = describe_machine()
    rows: list[Row] = []
    for gpus in arguments.gpus:
        for trace in traces(arguments, gpus):
            trace = trace.longest_first(gpus) if arguments.longest_first else trace
            rows += compare(trace, gpus, arguments)
    if arguments.history:
        rows += history_rows(arguments)
    facts = {"jobs": arguments.jobs, "seed": arguments.seed, "faults per GPU hour": arguments.faults}
    print_report("Scheduling under a virtual clock", machine, rows, facts, as_json=arguments.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8], help="sizes of the box")
    parser.add_argument("--jobs", type=int, default=1000, help="of each random trace")
    parser.add_argument("--patterns", nargs="*", choices=[*PATTERNS], default=[*PATTERNS], help="of the random traces")
    parser.add_argument("--load", type=float, default=0.9, help="where submissions are spread over time: work / GPUs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", nargs="+", type=Path, default=[], help="files that record_trace.py wrote")
    parser.add_argument("--schedulers", nargs="+", choices=[*SCHEDULERS], default=[*SCHEDULERS])
    parser.add_argument("--longest-first", action="store_true", help="the lengths of jobs are their priorities")
    parser.add_argument("--evaluators", type=int, help="jobs that may run at once; the service's default unless given")
    parser.add_argument("--faults", type=float, default=0.0, help="deaths of workers for each GPU hour, with ours only")
    parser.add_argument("--history", type=int, default=0, help="jobs that have ended before, for decision times")
    return parser.parse_args()


def traces(arguments: argparse.Namespace, gpus: int) -> Iterator[Trace]:
    """Those that were asked for."""
    for pattern in arguments.patterns:
        yield random_trace(pattern, arguments.jobs, gpus, arguments.load, arguments.seed)
    yield from map(read_trace, arguments.trace)


def ours(evaluators: int | None) -> Steps:
    return Scheduler(evaluators=evaluators, max_attempts=MAX_ATTEMPTS)


SCHEDULERS: dict[str, Callable[[int | None], Steps]] = {
    OURS: ours,
    "FIFO, always loads": Fifo,
    "one at a time": OneAtATime,
}


def compare(trace: Trace, gpus: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each scheduler."""
    for name in arguments.schedulers:
        if arguments.faults and name != OURS:
            continue
        faults = random_faults(trace.bound_s(gpus), gpus, arguments.faults, arguments.seed)
        world = World(trace, gpus, SCHEDULERS[name](arguments.evaluators), faults=faults)
        run(world)
        decisions = decision_figures(world) if name == OURS else {}
        yield {"trace": trace.name, "GPUs": gpus, "scheduler": name} | figures(trace, gpus, world) | decisions


def run(world: World) -> None:
    """With what there is by now kept from the garbage collector, as the server does before it serves."""
    gc.collect()
    gc.freeze()
    try:
        world.run()
    finally:
        gc.unfreeze()


def random_faults(until_s: float, gpus: int, per_gpu_hour: float, seed: int) -> tuple[Fault, ...]:
    """A Poisson process on each GPU, until the bound of the trace."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    for gpu in range(gpus if per_gpu_hour else 0):
        at_s = chance.expovariate(per_gpu_hour / 3600)
        while at_s < until_s:
            lost_s = LOST_SECONDS if chance.random() < LOST_SHARE else 0.0
            faults.append(Fault(at_s=at_s, gpu=gpu, lost_s=lost_s))
            at_s += chance.expovariate(per_gpu_hour / 3600)
    return tuple(faults)


def history_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Decision times with --jobs queued, of a new scheduler and of one through which --history jobs have passed."""
    gpus = arguments.gpus[-1]
    trace = random_trace("all-at-once", arguments.jobs, gpus, seed=arguments.seed)
    for name, jobs in (("no history", 0), (f"{arguments.history:,} ended jobs", arguments.history)):
        long = after_history(trace, jobs, gpus)
        world = World(long, gpus, ours(arguments.evaluators))
        run(world)
        yield {"trace": f"{trace.name}, {name}", "GPUs": gpus, "scheduler": OURS} | decision_figures(world)


if __name__ == "__main__":
    sys.exit(main())
