"""Traces: their bound, their file, and what the random ones look like."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from sim_random_traces import PATTERNS, random_trace
from sim_traces import TraceJob, TraceModel, make_trace, read_trace, write_trace


def job(name: str, **fields: object) -> TraceJob:
    return TraceJob(**{"id": name, "arrival_s": 0.0, "model": "m", "chunks": 10, "chunk_s": 2.0} | fields)


MODELS = [TraceModel(name="m", load_s=10.0), TraceModel(name="n", load_s=20.0, gpus=2)]


@pytest.mark.parametrize(
    ("jobs", "bound_s", "without_loads_s"),
    [
        # four times 20 s of work and a loading of 10 s on two GPUs
        ([job("a"), job("b"), job("c"), job("d")], 45, 40),
        # one job's path: loading, ten chunks one after the other, scoring
        ([job("a", prepare_s=3.0, score_s=5.0)], 10 + 20 + 5, 3 + 20 + 5),
        # on two replicas
        ([job("a", num_gpus=2)], 10 + 10, 10),
        # what comes late cannot begin before: 20 s of work and a model of two GPUs that loads once
        ([job("a"), job("b", arrival_s=100.0, model="n", num_gpus=2, chunks=3)], 100 + 20 + 6, 106),
        # loaded already by the first one
        ([job("a"), job("b", arrival_s=100.0)], 120, 120),
        ([job("a", arrival_s=5.0, chunks=0, prepare_s=3.0, score_s=1.0)], 9, 9),
    ],
)
def test_the_bound(jobs: list[TraceJob], bound_s: float, without_loads_s: float) -> None:
    trace = make_trace("t", MODELS, jobs)
    trace.check(2)
    assert trace.bound_s(2) == bound_s
    assert trace.bound_s(2, loads=False) == without_loads_s


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model": "x"}, "job a: model 'x' is not one of its models"),
        ({"model": "n"}, "job a: num_gpus is 1 on a box of 2, but a replica of n takes 2"),
        ({"gpu": 2}, "job a: gpu is 2 and num_gpus is 1, but on a box of 2 gpu must be below that"),
        ({"gpu": 0, "num_gpus": 2}, "job a: gpu is 0 and num_gpus is 2, but .* num_gpus 1 beside it"),
        ({"chunk_s": -1.0}, "job a: counts and seconds must not be negative"),
        ({"arrival_s": -1.0}, "job a: arrival_s"),
    ],
)
def test_a_trace_that_cannot_be_run_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_trace("t", MODELS, [job("a", **wrong)]).check(2)


def test_longest_first_makes_lengths_priorities_and_changes_nothing_else() -> None:
    trace = make_trace("t", [TraceModel(name="m", load_s=5.0)], [job("short", chunks=3), job("long", chunks=30)])
    longest = trace.longest_first(2)
    assert {each.id: each.priority for each in longest.jobs} == {"short": 11, "long": 65}
    assert longest.bound_s(2) == trace.bound_s(2)


def test_a_file_gives_the_trace_back(tmp_path: Path) -> None:
    trace = random_trace("checkpoints", 30, 8)
    file = tmp_path / "t.jsonl"
    write_trace(trace, file)
    read = read_trace(file)
    assert (read.name, read.models, read.jobs) == ("t", trace.models, trace.jobs)


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    write_trace(random_trace("few-models", 1, 8), file)
    with file.open("a") as lines:
        lines.write('{"type": "job", "id": "x", "arrival": 3}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 6: Object "):
        read_trace(file)


@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_traces_can_be_run_and_repeat_with_their_seed(pattern: str, gpus: int) -> None:
    trace = random_trace(pattern, 100, gpus, seed=1)
    trace.check(gpus)
    assert len(trace.jobs) == len({job.id for job in trace.jobs}) == 100
    assert trace == random_trace(pattern, 100, gpus, seed=1)
    assert trace != random_trace(pattern, 100, gpus, seed=2)


@pytest.mark.parametrize("pattern", ["poisson", "checkpoints"])
def test_spread_traces_have_the_load_that_is_stated(pattern: str) -> None:
    loads: list[float] = []
    for seed in range(10):
        trace = random_trace(pattern, 2000, 8, load=0.5, seed=seed)
        work_s = sum(map(trace.work_s, trace.jobs)) + sum(model.load_s for model in trace.models.values())
        loads.append(work_s / 8 / trace.jobs[-1].arrival_s)
    assert statistics.mean(loads) == pytest.approx(0.5, rel=0.1)


def test_sizes_have_a_heavy_tail() -> None:
    trace = random_trace("all-at-once", 10_000, 8)
    sizes = sorted(map(trace.work_s, trace.jobs), reverse=True)
    assert 16 < statistics.median(sizes) < 20
    assert 350 < sizes[100] < 450
    assert sum(sizes[:1000]) > 0.4 * sum(sizes)
