"""The store on SQLite files and on a PostgreSQL: what is committed stays, exactly one of many wins, pages hold."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
from databases import NOON, execute, explain, make_job, query
from sqlalchemy.exc import IntegrityError

from gpu_pool.errors import InvalidRequest, JobNotFound
from gpu_pool.history import Attempt
from gpu_pool.job_pages import _page
from gpu_pool.records import Evaluation, Job, JobResult, JobState, ModelArgs, ModelSpec, Phase, Progress, TaskProgress
from gpu_pool.store import MOST_ENDED, Store

FULL = 2  # of PRAGMA synchronous


@pytest.fixture
async def store(database: Path | str) -> AsyncIterator[Store]:
    opened = await Store.open(database)
    yield opened
    await opened.close()


async def test_a_job_comes_back_as_it_was_added(store: Store) -> None:
    job = Job(
        id="full",
        work=Evaluation(model="hf", tasks=("a",), batch_size="auto", limit=10),
        request={"tasks": ["a"], "text": "naïve ☃", "nested": {"x": [1, 2.5, None]}},
        state=JobState.COMPLETED,
        created_at=NOON,
        started_at=NOON + timedelta(seconds=1),
        completed_at=NOON + timedelta(seconds=2),
        attempt=2,
        error="no error, but 'quotes'",
        model=ModelSpec(kind="hf", args=ModelArgs(pretrained="/m", think_end_token=7), fingerprint="ab", device="cuda"),
        progress=Progress(phase=Phase.SCORING, tasks={"a": TaskProgress(done=1, total=2)}, cached=1, workers={"w": 1}),
        metrics={"a": {"acc,none": 0.25, "acc_stderr,none": "N/A"}},
        result=JobResult(
            model_name="m", results_path="/r.json", samples={"a": "/s"}, metrics={"a": {"acc,none": 0.25}}
        ),
    )
    await store.add(job)
    assert await store.get("full") == job


async def test_times_of_any_zone_come_back_in_utc(store: Store) -> None:
    await store.add(make_job("1"))
    await store.update("1", started_at=NOON.astimezone(timezone(timedelta(hours=-7))))
    started_at = (await store.get("1")).started_at
    assert started_at == NOON
    assert started_at.tzinfo is UTC


async def test_an_unknown_job_is_an_error(store: Store) -> None:
    with pytest.raises(JobNotFound):
        await store.get("nobody")
    with pytest.raises(JobNotFound):
        await store.update("nobody", attempt=1)
    assert not await store.change_state("nobody", JobState.QUEUED, JobState.RUNNING)


async def test_a_change_of_state_writes_its_fields_and_only_from_the_old_state(store: Store) -> None:
    await store.add(make_job("1"))
    assert await store.change_state("1", JobState.QUEUED, JobState.RUNNING, started_at=NOON, attempt=1)
    assert not await store.change_state("1", JobState.QUEUED, JobState.CANCELLED, error="too late")
    job = await store.get("1")
    assert (job.state, job.started_at, job.attempt, job.error) == (JobState.RUNNING, NOON, 1, None)
    assert await store.change_state("1", JobState.RUNNING, JobState.QUEUED, started_at=None, progress=None)
    assert (await store.get("1")).started_at is None


async def test_one_of_many_wins_a_change_of_state(store: Store) -> None:
    await store.add(make_job("1"))
    ends = [JobState.RUNNING, JobState.CANCELLED] * 50
    won = await asyncio.gather(*(store.change_state("1", JobState.QUEUED, new) for new in ends))
    assert sum(won) == 1
    assert (await store.get("1")).state is ends[won.index(True)]


async def test_an_error_that_is_no_text_is_still_stored(store: Store) -> None:
    await store.add(make_job("1"))
    await store.update("1", error="bad name: \udcff, \0")
    assert (await store.get("1")).error == "bad name: ?, �"


async def test_a_cancelled_caller_leaves_a_working_store(store: Store) -> None:
    await store.add(make_job("1"))
    writers = [asyncio.create_task(store.update("1", attempt=number)) for number in range(20)]
    await writers[0]
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    await store.update("1", attempt=99)
    assert (await store.get("1")).attempt == 99


async def test_ended_jobs_are_read_from_the_database_once_and_again_when_they_changed(
    store: Store, database: Path | str
) -> None:
    await store.add(make_job("1", JobState.COMPLETED))
    await store.add(make_job("2", JobState.RUNNING))
    seen = [await store.get("1"), await store.get("2")]
    execute(database, "UPDATE jobs SET attempt = 7")
    assert await store.get("1") is seen[0]
    assert [job.attempt for job in await store.list(None, 5)] == [7, 0]
    await asyncio.gather(store.get("1"), store.update("1", error="found later"), store.get("1"))
    assert (await store.get("1")).error == "found later"
    assert (await store.list(None, 5))[1].error == "found later"


async def test_many_more_ended_jobs_than_are_kept_in_memory(store: Store) -> None:
    count = MOST_ENDED + 50
    for number in range(count):
        await store.add(make_job(str(number), JobState.COMPLETED))
    for _ in range(2):
        assert [job.id for job in await store.list(None, count)] == [str(number) for number in reversed(range(count))]
    assert (await store.get("0")).id == "0"


async def test_pages_are_newest_first_and_meet_without_gap_or_overlap(store: Store) -> None:
    states = [JobState.QUEUED, JobState.RUNNING, JobState.CANCELLING, JobState.FAILED]
    for number in range(20):
        await store.add(make_job(str(number), states[number % 4]))
    seen: list[str] = []
    while page := await store.list(None, 7, seen[-1] if seen else None):
        seen += [job.id for job in page]
    assert seen == [str(number) for number in reversed(range(20))]

    active = {JobState.RUNNING, JobState.CANCELLING}
    first = await store.list(active, 3, None)
    second = await store.list(active, 100, first[-1].id)
    assert [job.id for job in first] == ["18", "17", "14"]
    assert [job.id for job in second] == ["13", "10", "9", "6", "5", "2", "1"]
    assert [job.id for job in await store.list(JobState.FAILED, 2, None)] == ["19", "15"]
    assert await store.list((), 5, None) == []


async def test_an_unknown_cursor_names_its_field(store: Store) -> None:
    with pytest.raises(InvalidRequest, match="no job gone") as caught:
        await store.list(None, 5, "gone")
    assert caught.value.field == "cursor"


async def test_unfinished_jobs_are_oldest_first_and_all_states_are_counted(store: Store) -> None:
    for number, state in enumerate(JobState):
        await store.add(make_job(str(number), state))
    await store.add(make_job("last"))
    unfinished = await store.unfinished()
    assert [job.state for job in unfinished[:3]] == [JobState.QUEUED, JobState.RUNNING, JobState.CANCELLING]
    assert [job.id for job in unfinished[3:]] == ["last"]
    assert await store.counts() == dict.fromkeys(JobState, 1) | {JobState.QUEUED: 2}


async def test_attempts_begin_and_end_with_changes_of_state(store: Store, database: Path | str) -> None:
    later = NOON + timedelta(seconds=5)
    queued, running = JobState.QUEUED, JobState.RUNNING
    first, second = Attempt(number=1, started_at=NOON), Attempt(number=2, started_at=later)
    lost = msgspec.structs.replace(first, ended_at=later, outcome="requeued", cause="worker w1 died (signal 9)")
    await store.add(make_job("1"))
    assert await store.change_state("1", queued, running, first)
    assert await store.change_state("1", running, queued, lost)
    assert await store.change_state("1", queued, running, second)
    assert not await store.change_state("1", queued, running, Attempt(number=3, started_at=later))
    rows = query(database, "SELECT number, ended_at IS NULL, outcome, cause FROM attempts ORDER BY number")
    assert rows == [(1, 0, "requeued", "worker w1 died (signal 9)"), (2, 1, None, None)]


async def test_a_change_of_state_is_written_with_all_that_goes_with_it_or_not_at_all(
    store: Store, database: Path | str
) -> None:
    await store.add(make_job("1"))
    attempt = Attempt(number=1, started_at=NOON)
    assert await store.change_state("1", JobState.QUEUED, JobState.RUNNING, attempt, attempt=1)
    assert await store.change_state("1", JobState.RUNNING, JobState.QUEUED)
    with pytest.raises(IntegrityError):  # there is an attempt of that number
        await store.change_state("1", JobState.QUEUED, JobState.RUNNING, attempt, attempt=2)
    job = await store.get("1")
    assert (job.state, job.attempt) == (JobState.QUEUED, 1)
    assert query(database, "SELECT count(*) FROM attempts") == [(1,)]


async def test_scores_of_a_result_are_rows_and_a_new_result_replaces_them(store: Store, database: Path | str) -> None:
    await store.add(make_job("1", JobState.RUNNING))
    metrics = {
        "arc_easy": {"alias": "arc", "sample_len": 8, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 1},
        "gsm8k": {"exact_match,strict": float("nan"), "exact_match,flex": 0.25, "exact_match_stderr,flex": "N/A"},
    }
    result = JobResult(model_name="m", results_path="/r", metrics=metrics)
    better = JobResult(
        model_name="m", results_path="/r", metrics={"arc_easy": metrics["arc_easy"] | {"acc,none": 0.75}}
    )
    assert not await store.change_state("1", JobState.QUEUED, JobState.COMPLETED, result=result)
    assert query(database, "SELECT count(*) FROM scores") == [(0,)]
    assert await store.change_state("1", JobState.RUNNING, JobState.COMPLETED, result=result)
    await store.update("1", result=better)
    await store.update("1", result=JobResult(model_name="m", results_path="/r"))
    assert query(database, "SELECT task, metric, value, stderr FROM scores ORDER BY task, metric") == [
        ("arc_easy", "acc,none", 0.75, 0.1),
        ("arc_easy", "acc_norm,none", 1.0, None),
        ("gsm8k", "exact_match,flex", 0.25, None),
    ]


async def test_everything_survives_a_reopen(database: Path | str) -> None:
    for number in range(3):
        store = await Store.open(database)
        await store.add(make_job(str(number)))
        jobs = await store.list(None, 10, None)
        await store.close()
        assert [job.id for job in jobs] == [str(each) for each in reversed(range(number + 1))]


async def test_many_that_open_a_new_database_at_once_migrate_it_once(database: Path | str) -> None:
    stores = await asyncio.gather(*(Store.open(database) for _ in range(8)))
    for number, store in enumerate(stores):
        await store.add(make_job(str(number)))
    assert len(await stores[0].list(None, 10, None)) == 8
    for store in stores:
        await store.close()


async def test_opening_leaves_logging_alone(tmp_path: Path) -> None:
    mine = logging.getLogger("tests.mine")
    before = (list(logging.root.handlers), logging.root.level)
    await (await Store.open(tmp_path / "100% new" / "jobs.sqlite3")).close()
    assert (list(logging.root.handlers), logging.root.level) == before
    assert not mine.disabled


@pytest.mark.parametrize("states", [None, {JobState.FAILED}])
@pytest.mark.parametrize("tags", [(), ("a",), ("a", "b")])
async def test_lists_do_not_read_or_sort_the_whole_table(
    store: Store, database: Path | str, states: set[JobState] | None, tags: tuple[str, ...]
) -> None:
    await store.add(make_job("1"))
    statement = _page(older=True, in_state=states is not None, tags=len(tags))
    values = {"before": 9, "most": 5, "state": "failed", "tag_0": "a", "tag_1": "b"}
    bound = statement.params({name: value for name, value in values.items() if name in statement.compile().params})
    plan = explain(database, bound)
    assert "Index" in plan or "SEARCH" in plan
    assert not [word for word in ("TEMP B-TREE", "Sort", "Seq Scan", "SCAN") if word in plan], plan


WRITER = """
import asyncio, sys
from pathlib import Path
from gpu_pool.records import JobState
from gpu_pool.store import MOST_ENDED, Store
sys.path += sys.argv[2:]
from databases import make_job

async def main():
    database = sys.argv[1]
    store = await Store.open(database if "://" in database else Path(database))
    for number in range(100_000):
        await store.add(make_job(str(number)))
        await store.change_state(str(number), JobState.QUEUED, JobState.RUNNING, attempt=1)
        print(number, flush=True)

asyncio.run(main())
"""


async def test_a_killed_writer_loses_nothing_that_was_committed(database: Path | str) -> None:
    command = [sys.executable, "-c", WRITER, str(database), *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 50:
                break
        os.kill(writer.pid, signal.SIGKILL)
        committed = 50 + len(writer.stdout.readlines())
    store = await Store.open(database)
    jobs = await store.unfinished()
    await store.close()
    assert len(jobs) in (committed + 1, committed + 2)  # the one in the making may have come through
    assert {job.state for job in jobs[: committed + 1]} == {JobState.RUNNING}
    assert [job.id for job in jobs] == [str(number) for number in range(len(jobs))]


async def test_what_is_committed_outlasts_a_loss_of_power(tmp_path: Path) -> None:
    """As far as SQLite and the disk can see to it; PostgreSQL does by itself."""
    store = await Store.open(tmp_path / "jobs.sqlite")
    assert await store._database.read(lambda opened: opened.exec_driver_sql("PRAGMA synchronous").scalar()) == FULL
    await store.close()
