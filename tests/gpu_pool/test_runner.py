"""What is wrong with one job must not end the others: the runner against a scheduler's decisions and a real store."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fake_children
import pytest
from fake_nvml import FakeNvml, gpu_line, gpu_uuid
from small_disk import mounted

from gpu_pool import events as ev
from gpu_pool.database import Database
from gpu_pool.errors import ShuttingDown
from gpu_pool.fleet import EvaluatorChild, Processes
from gpu_pool.gpus import Inventory
from gpu_pool.hardware import Slot
from gpu_pool.leases import Leases
from gpu_pool.ledger import Evaluator, Running
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.messages import decode_from_evaluator
from gpu_pool.records import Evaluation, EvaluatorState, Job, JobState, ModelArgs, ModelSpec
from gpu_pool.runner import Runner
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store
from gpu_pool.supervisor import spawn
from gpu_pool.transitions import JobEvent
from gpu_pool.watchdog import QUESTIONS


async def no_process(*_: object) -> None:
    """What a box says that has no memory left for processes."""
    raise OSError("cannot allocate memory")


@pytest.fixture
async def store(tmp_path: Path) -> object:
    store = await Store.open(tmp_path / "jobs.sqlite")
    yield store
    await store.close()


def make_runner(
    settings: PoolSettings,
    jobs: LiveJobs,
    leases: Leases,
    refresh: Callable[[Job, float], None] = lambda job, ran_s: None,
) -> Runner:
    """A runner on a box that cannot start any process."""
    processes = Processes(evaluator=no_process, worker=no_process, address=str)
    return Runner(settings, jobs, leases, processes, lambda job_id: settings.data_dir / job_id, refresh)


async def started(store: Store, runner: Runner, output: Path) -> Job:
    """What becomes of a job that is started with this folder for its results."""
    spec = ModelSpec(kind="hf", args=ModelArgs(pretrained="m"), fingerprint="f")
    job = Job(
        id="j",
        work=Evaluation(model="hf", tasks=("t",), output_dir=str(output)),
        request={},
        created_at=datetime.now(UTC),
        model=spec,
    )
    await store.add(job)
    runner.jobs["j"] = job
    demand = ev.Demand(job_id="j", spec=spec, max_replicas=1, order=0.0)
    runner.scheduler.ledger.running["j"] = Running(demand=demand, evaluator_id="e")
    await runner._start_job(ev.StartJob(job_id="j", evaluator_id="e"))
    await runner.handle(ev.Tick)
    return await store.get("j")


async def test_a_job_that_cannot_be_started_fails_alone(store: Store, tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1)
    runner = make_runner(settings, LiveJobs(store, {}), Leases(settings, Inventory(visible_devices="")))
    (tmp_path / "file").touch()
    loop = runner.start()
    job = await started(store, runner, tmp_path / "file" / "below")
    assert job.state is JobState.FAILED
    assert "cannot be started" in (job.error or "")
    assert not loop.done()
    await asyncio.wait_for(runner.stop(), 30)


async def test_a_job_is_started_while_there_is_no_room_for_its_results(store: Store, tmp_path: Path) -> None:
    """They are not there yet, and whoever writes them waits."""
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1)
    runner = make_runner(settings, LiveJobs(store, {}), Leases(settings, Inventory(visible_devices="")))
    (tmp_path / "small").mkdir()
    runner.start()
    with mounted(tmp_path / "small", 1 << 20, files=1) as small:
        with pytest.raises(OSError, match="No space left"):
            (small / "results").mkdir()
        assert (await started(store, runner, small / "results")).state is JobState.RUNNING
    await asyncio.wait_for(runner.stop(), 30)


async def test_a_worker_that_ends_reopens_no_gpu_that_someone_else_wants(
    store: Store, tmp_path: Path, fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvml.install_here(monkeypatch)
    fake_nvml.write(gpu_line(), gpu_line())
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1, yield_to_foreign=True)
    leases = Leases(settings, Inventory(None))
    runner = make_runner(settings, LiveJobs(store, {}), leases)
    runner.start()
    assert await leases.take("stays", [gpu_uuid(0)]) is None
    assert await leases.take("ends", [gpu_uuid(1)]) is None
    fake_nvml.write(gpu_line(), gpu_line(), f"proc 0 {2**22 + 77} 2048")
    await runner.look()
    await runner._reclaim(ev.ReclaimSlots(worker_id="ends", slot_ids=(gpu_uuid(1),)))
    await runner.handle(ev.Tick)
    assert runner.scheduler.ledger.slots.closed == {gpu_uuid(0)}
    await asyncio.wait_for(runner.stop(), 30)


class Blind(Leases):
    """Cannot look at what it holds."""

    has_gpus = True

    async def look(self) -> tuple[tuple[Slot, str | None], ...]:
        raise RuntimeError("a defect")


async def test_slots_return_whatever_goes_wrong_when_they_are_looked_at(store: Store, tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=1, evaluators=1)
    runner = make_runner(settings, LiveJobs(store, {}), Blind(settings, Inventory(visible_devices="")))
    with pytest.raises(RuntimeError, match="a defect"):
        await runner._reclaim(ev.ReclaimSlots(worker_id="w", slot_ids=("cpu:0",)))
    event, _ = runner._events.get_nowait()
    assert isinstance(event, ev.SlotsReturned)
    assert event.worker_id == "w"


UNRESPONSIVE_SECONDS = 6.0
"""More than a process needs to start to answer, on a loaded machine."""


async def test_an_evaluator_lives_however_long_the_database_is_locked(store: Store, tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1, unresponsive_s=UNRESPONSIVE_SECONDS)

    async def start(name: str) -> EvaluatorChild:
        return await spawn(name, fake_children.scores_tasks, str(tmp_path), decode_from_evaluator)

    leases = Leases(settings, Inventory(visible_devices=""))
    processes = Processes(evaluator=start, worker=no_process, address=str)
    runner = Runner(
        settings, LiveJobs(store, {}), leases, processes, lambda job_id: tmp_path / job_id, lambda job, ran_s: None
    )
    await runner.jobs.start(await store.add(add_job(runner)))
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await runner.fleet.start_evaluator("e")
        async with asyncio.timeout(120):
            for answers in range(1, QUESTIONS + 3):  # the last of them come later than `unresponsive_s`
                event, _ = await runner._events.get()
                assert (type(event), event.done) == (ev.JobProgressed, answers)
        assert (await store.get("j")).metrics == {}
    scores = {"one": {"acc,none": 0.25}, "two": {"acc,none": 0.75}}
    assert runner.jobs["j"].metrics == scores
    await runner.jobs.change(runner.jobs["j"], JobEvent.CANCEL)  # what was noted before is written before
    assert (await store.get("j")).metrics == scores
    await asyncio.wait_for(runner.stop(), 30)


def add_job(runner: Runner, job_id: str = "j", **fields: object) -> Job:
    evaluation = Evaluation(model="hf", tasks=("t",))
    job = Job(id=job_id, work=evaluation, request={}, created_at=datetime.now(UTC), **fields)
    runner.jobs[job_id] = job
    return job


def demand_of(job: Job) -> ev.Demand:
    spec = ModelSpec(kind="hf", args=ModelArgs(pretrained="m"), fingerprint="f")
    return ev.Demand(job_id=job.id, spec=spec, max_replicas=1, order=0.0)


class HeldStore(Store):
    """One whose changes of state wait until a test lets them go on, or fail."""

    def hold(self) -> None:
        self.reached, self.gate = asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None

    async def change_state(self, *arguments: Any, **fields: Any) -> bool:
        self.reached.set()
        await self.gate.wait()
        if failure := self.failure:
            self.failure = None
            raise failure
        return await super().change_state(*arguments, **fields)


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[HeldStore]:
    store = HeldStore(await Database.open(tmp_path / "held.sqlite"))
    store.hold()
    yield store
    await store.close()


async def test_a_job_is_cancelled_while_it_goes_back_for_another_look_at_its_model(
    held: HeldStore, tmp_path: Path
) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1)
    looked_at: list[tuple[Job, float]] = []
    leases = Leases(settings, Inventory(visible_devices=""))
    runner = make_runner(settings, LiveJobs(held, {}), leases, lambda *how: looked_at.append(how))
    held.gate.set()
    job = await runner.jobs.start(await held.add(add_job(runner)))
    runner._given.add("j")
    runner.scheduler.ledger.evaluators["e"] = Evaluator(EvaluatorState.RUNNING, "j")
    runner.scheduler.ledger.running["j"] = Running(demand=demand_of(job), evaluator_id="e", seconds=7.0)
    held.hold()
    loop = runner.start()
    runner.put(ev.JobEnded, job_id="j", content_changed=True)
    await held.reached.wait()
    cancelling = asyncio.create_task(runner.cancel("j"))
    await asyncio.sleep(0)  # it looks where the job is
    held.gate.set()
    await asyncio.wait_for(cancelling, 30)
    assert (await held.get("j")).state is JobState.CANCELLED
    assert not runner.jobs
    assert [(job.state, ran_s) for job, ran_s in looked_at] == [(JobState.QUEUED, 7.0)]
    assert not loop.done()
    await asyncio.wait_for(runner.stop(), 30)


async def test_a_job_that_could_not_be_ended_goes_on(held: HeldStore, tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1)
    runner = make_runner(settings, LiveJobs(held, {}), Leases(settings, Inventory(visible_devices="")))
    job = await held.add(add_job(runner))
    ending = asyncio.create_task(runner.settle_queued("j", JobEvent.CANCEL, None))
    await held.reached.wait()
    runner.submit(demand_of(job))  # its model is known now
    held.failure = RuntimeError("another server uses the database")
    held.gate.set()
    with pytest.raises(RuntimeError, match="another server"):
        await ending
    runner.start()
    await runner.handle(ev.Tick)
    assert list(runner.scheduler.ledger.waiting) == ["j"]
    await runner.cancel("j")
    assert (await held.get("j")).state is JobState.CANCELLED
    await asyncio.wait_for(runner.stop(), 30)


async def test_whoever_waits_for_an_event_hears_of_the_end(store: Store, tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1)
    runner = make_runner(settings, LiveJobs(store, {}), Leases(settings, Inventory(visible_devices="")))
    cancelling = asyncio.create_task(runner.handle(ev.CancelRequested, job_id="j"))
    await asyncio.sleep(0)  # it has queued its event
    await asyncio.wait_for(runner.stop(), 30)
    for waiting in (cancelling, runner.handle(ev.CancelRequested, job_id="j")):
        with pytest.raises(ShuttingDown):
            await asyncio.wait_for(waiting, 30)
