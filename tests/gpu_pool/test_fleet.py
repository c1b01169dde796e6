"""What processes say becomes events: the fleet without any process, against real leases on the fake NVML library."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_children
import pytest
from fake_nvml import FakeNvml, gpu_line, gpu_uuid

from gpu_pool import events as ev
from gpu_pool.fleet import MAX_RESTART_PAUSE_SECONDS, EvaluatorChild, Fleet, Processes, WorkerChild, restart_pause
from gpu_pool.gpus import Inventory
from gpu_pool.leases import Leases
from gpu_pool.messages import (
    EvaluatorStart,
    LoadFailed,
    RunJob,
    WorkerUnreachable,
    decode_from_evaluator,
    decode_from_worker,
)
from gpu_pool.records import Evaluation, ModelArgs, ModelSpec
from gpu_pool.settings import PoolSettings
from gpu_pool.supervisor import spawn
from gpu_pool.watchdog import QUESTIONS


async def none(*_: object) -> None:
    """No process is started, and nobody hears."""


def fleet_of(
    settings: PoolSettings,
    leases: Leases,
    put: Callable[[tuple[type[ev.Event], dict[str, object]]], object],
    evaluator: Callable[..., Any] = none,
    worker: Callable[..., Any] = none,
) -> Fleet:
    """It starts processes by these functions, and its events, each with its fields, are `put`."""
    return Fleet(
        settings,
        leases,
        Processes(evaluator=evaluator, worker=worker, address=str),
        put=lambda event, **fields: put((event, fields)),
        hear=none,
        background=asyncio.ensure_future,
    )


@pytest.mark.parametrize("out_of_memory", [True, False])
@pytest.mark.parametrize("stranger", [True, False])
async def test_a_model_that_lacks_memory_beside_others_is_no_mistake_of_its_job(
    tmp_path: Path,
    fake_nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    stranger: bool,
    out_of_memory: bool,
) -> None:
    fake_nvml.install_here(monkeypatch)
    fake_nvml.write(gpu_line(), gpu_line())
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1)
    leases = Leases(settings, Inventory(None))
    happened: list[tuple[type[ev.Event], dict[str, object]]] = []
    fleet = fleet_of(settings, leases, happened.append)
    assert await leases.take("worker", [gpu_uuid(1)]) is None
    fake_nvml.write(gpu_line(), gpu_line(), f"proc {int(stranger)} {2**22 + 77} 2048")
    await fleet._on_worker_message("worker", LoadFailed(error="no room", out_of_memory=out_of_memory))
    [(event, fields)] = happened
    assert event is ev.WorkerLoadFailed
    assert fields["crowded"] == (stranger and out_of_memory)


async def test_why_an_evaluator_ends_is_in_its_log_and_in_what_becomes_of_its_job(tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=0, evaluators=1)
    happened: asyncio.Queue[tuple[type[ev.Event], dict[str, object]]] = asyncio.Queue()
    log = tmp_path / "evaluator.log"

    async def start(evaluator_id: str) -> EvaluatorChild:
        start = EvaluatorStart(evaluator_id=evaluator_id, data_dir=str(tmp_path), log_path=str(log))
        return await spawn(evaluator_id, fake_children.breaks_at_its_first_job, start, decode_from_evaluator)

    fleet = fleet_of(settings, Leases(settings, Inventory(visible_devices="")), happened.put_nowait, evaluator=start)
    await fleet.start_evaluator("e")
    async with asyncio.timeout(120):
        assert await happened.get() == (ev.EvaluatorIsReady, {"evaluator_id": "e"})
        evaluation = Evaluation(model="hf", tasks=("t",))
        model = ModelSpec(kind="hf", args=ModelArgs(pretrained="m"), fingerprint="f")
        paths = {"output_dir": str(tmp_path), "log_path": str(log)}
        fleet.tell("e", RunJob(job_id="j", evaluation=evaluation, model=model, **paths))
        died, how = await happened.get()
    assert died is ev.EvaluatorDied
    assert how == {"evaluator_id": "e", "cause": "LookupError: what nobody thought of", "from_outside": False}
    assert "in open_job" in log.read_text()


async def with_a_worker_that_loads(
    tmp_path: Path, **settings: float
) -> tuple[Fleet, asyncio.Queue[tuple[type[ev.Event], dict[str, object]]]]:
    """A fleet whose worker `w` loads for ever, and what happens to it."""
    pool_settings = PoolSettings(data_dir=tmp_path, cpu_workers=1, evaluators=1, **settings)
    leases = Leases(pool_settings, Inventory(visible_devices=""))
    happened: asyncio.Queue[tuple[type[ev.Event], dict[str, object]]] = asyncio.Queue()

    async def start(worker_id: str, *_: object) -> WorkerChild:
        return await spawn(worker_id, fake_children.loads_for_ever, str(tmp_path), decode_from_worker)

    fleet = fleet_of(pool_settings, leases, happened.put_nowait, worker=start)
    [slot] = leases.slots("cpu")
    model = ModelSpec(kind="hf", args=ModelArgs(pretrained="m"), fingerprint="f", device="cpu")
    await fleet.start_worker(ev.StartWorker(worker_id="w", spec=model, slot_ids=(slot.id,)), [slot])
    return fleet, happened


UNRESPONSIVE_SECONDS = 8.0
"""More than a process needs to start to answer, on a loaded machine."""


async def test_a_worker_that_is_stopped_while_it_loads_is_found_and_one_that_loads_for_long_is_not(
    tmp_path: Path,
) -> None:
    fleet, happened = await with_a_worker_that_loads(tmp_path, unresponsive_s=UNRESPONSIVE_SECONDS)
    answers = 0
    watchdog = fleet._watchdogs["w"]

    def count(alive: Callable[[], None] = watchdog.alive) -> None:
        nonlocal answers
        answers += 1
        alive()
        if answers > QUESTIONS + 1:  # it has lived for longer than `unresponsive_s`
            os.kill(fleet.workers["w"].pid, signal.SIGSTOP)

    watchdog.alive = count
    async with asyncio.timeout(120):
        event, how = await happened.get()
    why = f"it did not answer for {UNRESPONSIVE_SECONDS:g} s (unresponsive_s) and was killed"
    assert (event, how) == (ev.WorkerDied, {"worker_id": "w", "cause": why, "from_outside": True})
    assert answers == QUESTIONS + 2
    assert not fleet.workers


@pytest.mark.parametrize("dies", [True, False])
async def test_a_worker_whose_connection_failed_is_out_of_reach_unless_it_was_dying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    monkeypatch.setattr("gpu_pool.fleet.DYING_SECONDS", 60.0 if dies else 0.001)
    fleet, happened = await with_a_worker_that_loads(tmp_path)
    report = WorkerUnreachable(job_id="j", worker_id="w", error="it closed the connection")
    async with asyncio.timeout(120):
        await fleet._on_evaluator_message("e", report)
        if not dies:
            reached = {"job_id": "j", "worker_id": "w", "cause": "it closed the connection"}
            assert await happened.get() == (ev.WorkerUnreachable, reached)
        os.kill(fleet.workers["w"].pid, signal.SIGKILL)
        how = {"worker_id": "w", "cause": "killed by SIGKILL", "from_outside": True}
        assert await happened.get() == (ev.WorkerDied, how)
    await fleet._on_evaluator_message("e", report)
    assert not fleet._timers
    assert happened.empty()


@pytest.mark.parametrize(
    ("failed_starts", "seconds"),
    [(1, 2.0), (4, 16.0), (5, MAX_RESTART_PAUSE_SECONDS), (5000, MAX_RESTART_PAUSE_SECONDS)],
)
def test_the_pause_before_a_restart_grows_to_a_limit(failed_starts: int, seconds: float) -> None:
    assert restart_pause(failed_starts) == seconds


async def test_what_is_late_is_not_kept(tmp_path: Path) -> None:
    """Nobody disarms what was awaited for a job that has ended."""
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=1, evaluators=1, drop_timeout_s=0.001)
    leases = Leases(settings, Inventory(visible_devices=""))
    fleet = fleet_of(settings, leases, none)
    fleet.detach(ev.Detach(job_id="j", evaluator_id="e", worker_id="w", at_once=False))
    assert fleet._timers
    async with asyncio.timeout(60):
        while fleet._timers:
            await asyncio.sleep(0.001)
