"""The simulated box: a trace computed by hand, and what must hold whatever the scheduler does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sim_baselines import Fifo, OneAtATime
from sim_figures import figures
from sim_traces import Trace, TraceJob, TraceModel, make_trace
from sim_world import Costs, Fault, Steps, World

from gpu_pool import events as ev
from gpu_pool.scheduler import Scheduler

COSTS = Costs(evaluator_start_s=1.0, stop_s=1.0, reclaim_s=2.0, tick_s=1.0)


def job(name: str, arrival_s: float = 0.0, **fields: object) -> TraceJob:
    """Two seconds of preparation, four chunks of five seconds, three of scoring."""
    usual = {"model": "m", "chunks": 4, "chunk_s": 5.0, "prepare_s": 2.0, "score_s": 3.0}
    return TraceJob(**{"id": name, "arrival_s": arrival_s} | usual | fields)


def trace(*jobs: TraceJob, gpus: int = 1) -> Trace:
    """On the models m and n, which load in ten seconds."""
    return make_trace("by hand", [TraceModel(name=name, load_s=10.0, gpus=gpus) for name in "mn"], list(jobs))


def ours() -> Scheduler:
    return Scheduler(evaluators=4, max_attempts=3)


@pytest.mark.parametrize("scheduler", [ours, lambda: Fifo(4)])
def test_a_job_for_one_certain_gpu_waits_for_that(scheduler: Callable[[], Steps]) -> None:
    # a has GPU 0 until 33; its worker's memory is back at 36
    asked = trace(job("a"), job("b", model="n", gpu=0))
    assert ends(World(asked, 2, scheduler(), COSTS)) == {"a": 33, "b": 36 + 33}


class Script:
    """A scheduler that answers every event with what was written down for it."""

    def __init__(self, actions: dict[type[ev.Event], list[ev.Action]]) -> None:
        self.actions = actions
        self.seen: list[ev.Event] = []

    def step(self, event: ev.Event) -> list[ev.Action]:
        self.seen.append(event)
        return self.actions.pop(type(event), [])


def ends(world: World) -> dict[str, float | None]:
    world.run(until_s=10_000)
    return {name: record.ended_s for name, record in world.jobs.items()}


def test_one_job_loads_while_it_prepares_then_computes_then_scores() -> None:
    asked = trace(job("a"))
    world = World(asked, 1, ours(), COSTS)
    assert ends(world) == {"a": 10 + 4 * 5 + 3}
    assert world.jobs["a"].started_s == 10
    assert (world.meter.total.loading, world.meter.total.computing, world.meter.total.usable) == (10, 20, 33)
    assert world.meter.while_waiting.usable == 0


def test_jobs_on_one_model_take_turns_on_its_replica() -> None:
    # chunks end at 15, 20, …, 50: a's, another of a's, which waited there before b came, then by turns; a's last at 40
    assert ends(World(trace(job("a"), job("b")), 1, ours(), COSTS)) == {"a": 40 + 3, "b": 50 + 3}


def test_fifo_loads_for_every_job_even_of_one_model() -> None:
    # 33 s a job; then the worker ends within 1 s, and its GPU is back after 2 s
    asked = trace(job("a"), job("b"), job("c", model="n"))
    assert ends(World(asked, 1, Fifo(4), COSTS)) == {"a": 33, "b": 36 + 33, "c": 72 + 33}
    assert ends(World(asked, 2, Fifo(4), COSTS)) == {"a": 33, "b": 33, "c": 36 + 33}


def test_fifo_takes_what_is_free_up_to_the_jobs_cap() -> None:
    asked = trace(job("a", num_gpus=4), job("b", num_gpus=4))
    assert ends(World(asked, 6, Fifo(4), COSTS)) == {"a": 10 + 5 + 3, "b": 10 + 2 * 5 + 3}


def test_one_at_a_time_is_that_on_any_box() -> None:
    asked = trace(job("a"), job("b"), job("c", num_gpus=2))
    scheduler = OneAtATime(4)
    assert ends(World(asked, 2, scheduler, COSTS)) == {"a": 33, "b": 36 + 33, "c": 72 + 10 + 2 * 5 + 3}


def test_replicas_of_several_gpus_wait_for_all_of_them() -> None:
    asked = trace(job("a", num_gpus=2), job("b", num_gpus=2), gpus=2)
    assert ends(World(asked, 3, Fifo(4), COSTS)) == {"a": 33, "b": 36 + 33}
    assert ends(World(asked, 4, Fifo(4), COSTS)) == {"a": 33, "b": 33}


@pytest.mark.parametrize(
    ("at_once", "done", "computed_s"),
    [(False, 2, 10), (True, 1, 7)],  # the second chunk runs from 15 to 20
)
def test_a_detached_worker_begins_no_further_chunk_of_the_job(at_once: bool, done: int, computed_s: float) -> None:
    spec = World(trace(job("a")), 1, ours(), COSTS).spec("m")
    attached = {"job_id": "a", "evaluator_id": "e", "worker_id": "w"}
    script = Script(
        {
            ev.SlotsSeen: [ev.StartEvaluator(evaluator_id="e")],
            ev.JobSubmitted: [
                ev.StartJob(job_id="a", evaluator_id="e"),
                ev.StartWorker(worker_id="w", spec=spec, slot_ids=("GPU-0",)),
            ],
            ev.WorkerLoaded: [ev.Attach(**attached)],
            ev.CancelRequested: [ev.Detach(**attached, at_once=at_once)],
        }
    )
    world = World(trace(job("a", cancel_s=17.0)), 1, script, COSTS)
    with pytest.raises(RuntimeError, match="1 jobs have not ended by 100 s"):
        world.run(until_s=100)
    assert (world.jobs["a"].done, world.jobs["a"].left) == (done, 4 - done)
    assert world.meter.total.computing == computed_s
    given_back = [event.now for event in script.seen if isinstance(event, ev.WorkerGivenBack)]
    assert given_back == ([] if at_once else [20])


def test_a_worker_that_dies_loses_its_running_chunk_only() -> None:
    asked = trace(job("a"))
    # loaded at 10, a chunk done at 15; killed at 18; free again at 20, loaded at 30, three chunks, scored
    world = World(asked, 1, ours(), COSTS, faults=(Fault(at_s=18.0, gpu=0),))
    assert ends(world) == {"a": 30 + 3 * 5 + 3}
    assert world.meter.total.computing == 20 + 3


def test_a_lost_gpu_is_not_usable_until_it_is_back() -> None:
    world = World(trace(job("a")), 1, ours(), COSTS, faults=(Fault(at_s=18.0, gpu=0, lost_s=50.0),))
    assert ends(world) == {"a": 68 + 10 + 3 * 5 + 3}
    assert world.meter.total.usable == 96 - 50


def test_a_job_that_is_cancelled_ends_so_and_lets_the_next_one_run() -> None:
    asked = trace(job("a", cancel_s=18.0), job("b", arrival_s=1.0, model="n"), job("c", cancel_s=2.0))
    world = World(asked, 1, ours(), COSTS)
    world.run(until_s=1000)
    assert {name: record.outcome for name, record in world.jobs.items()} == {
        "a": "cancelled",
        "b": "completed",
        "c": "cancelled",
    }


@pytest.mark.parametrize(
    ("actions", "wrong"),
    [
        (["start w", "start v"], "leased twice"),
        (["start job", "conclude"], "concluded before its end"),
        (["settle", "settle"], "after its end"),
        (["start job", "start job"], "does not wait"),
        (["start w", "start job", "attach"], "not loaded"),
    ],
)
def test_what_no_scheduler_may_do_is_noticed(actions: list[str], wrong: str) -> None:
    asked = trace(job("a"))
    spec = World(asked, 1, ours(), COSTS).spec("m")
    all_actions: dict[str, ev.Action] = {
        "start w": ev.StartWorker(worker_id="w", spec=spec, slot_ids=("GPU-0",)),
        "start v": ev.StartWorker(worker_id="v", spec=spec, slot_ids=("GPU-0",)),
        "start job": ev.StartJob(job_id="a", evaluator_id="e"),
        "conclude": ev.ConcludeJob(job_id="a"),
        "settle": ev.SettleJob(job_id="a", outcome="failed"),
        "attach": ev.Attach(job_id="a", evaluator_id="e", worker_id="w"),
    }
    script = Script(
        {
            ev.SlotsSeen: [ev.StartEvaluator(evaluator_id="e")],
            ev.JobSubmitted: [all_actions[name] for name in actions],
        }
    )
    with pytest.raises(AssertionError, match=wrong):
        World(asked, 1, script, COSTS).run(until_s=100)


def test_reports_of_progress_are_no_decisions() -> None:
    world = World(trace(job("a")), 1, script := Script({}), Costs(tick_s=1000.0, look_s=1000.0))
    for event in (ev.JobProgressed(now=0.0, job_id="a", done=1), ev.Tick(now=0.0)):
        world._tell(type(event), **{name: getattr(event, name) for name in event.__struct_fields__ if name != "now"})
    assert len(script.seen) == 2
    assert len(world.decisions.seconds()) == 1


def test_figures_of_a_run() -> None:
    asked = trace(job("a"), job("b", arrival_s=10.0))
    world = World(asked, 1, Fifo(4), COSTS)
    world.run()
    found = figures(asked, 1, world)
    # one loading and eight chunks; both bounds
    assert asked.bound_s(1) == 10 + 40
    assert asked.bound_s(1, loads=False) == 40
    assert found["makespan s"] == 69
    assert found["makespan / bound"] == 69 / 50
    assert found["mean wait s"] == (10 + 36) / 2
    assert found["p99 wait s"] == 36
    assert found["mean turnaround s"] == (33 + 59) / 2
    assert found["utilisation"] == 40 / 69
    assert found["while work waits"] == 20 / 26  # from 10 to 36, when b begins: the box computes until 30
    assert found["longest wait / bound"] == 36 / 50
    assert found["ended"] == "all"
