"""Ended jobs are deleted as the settings say, with their own files and nobody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from databases import NOON, make_job

from gpu_pool.live_jobs import LiveJobs
from gpu_pool.records import JobState
from gpu_pool.retention import BATCH, Retention
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "jobs.sqlite")
    yield opened
    await opened.close()


async def ended(store: Store, folder: Path, *job_ids: str) -> None:
    """Jobs that ended one after the other, an hour apart, each with files in its folder."""
    for number, job_id in enumerate(job_ids):
        job = make_job(job_id, JobState.COMPLETED)
        await store.add(msgspec.structs.replace(job, completed_at=NOON + timedelta(hours=number)))
        (folder / job_id / "results").mkdir(parents=True)
        (folder / job_id / "results" / "scores.json").touch()


async def left(store: Store, folder: Path) -> list[str]:
    """Ids of the jobs that are left; those that have files are the same."""
    job_ids = sorted(job.id for job in await store.list(None, 1000))
    assert sorted(path.name for path in folder.iterdir()) == job_ids
    return job_ids


async def test_jobs_that_ended_too_long_ago_go(store: Store, tmp_path: Path) -> None:
    folder, live = tmp_path / "jobs", LiveJobs(store, {JobState.COMPLETED: 3})
    await ended(store, folder, "a", "b", "c")
    await store.add(make_job("waiting"))
    (folder / "waiting").mkdir()
    retention = Retention(PoolSettings(retention_days=1), store, live.forget, folder)
    assert await retention.delete_expired(NOON + timedelta(days=1)) == 0
    assert await retention.delete_expired(NOON + timedelta(days=1, minutes=61)) == 2
    assert await left(store, folder) == ["c", "waiting"]
    assert live.ended == {JobState.COMPLETED: 1}


async def test_so_many_are_kept(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    job_ids = [f"{number:03}" for number in range(2 * BATCH + 5)]
    await ended(store, folder, *job_ids)
    retention = Retention(PoolSettings(retention_jobs=3), store, lambda deleted: None, folder)
    assert await retention.delete_expired(NOON) == len(job_ids) - 3
    assert await left(store, folder) == job_ids[-3:]


async def test_everything_is_kept_unless_told_otherwise(store: Store, tmp_path: Path) -> None:
    await ended(store, tmp_path / "jobs", "a")
    await Retention(PoolSettings(), store, lambda deleted: None, tmp_path / "jobs").run()  # returns
    assert await left(store, tmp_path / "jobs") == ["a"]


async def test_nothing_outside_the_jobs_folder_is_touched(store: Store, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data" / "jobs", tmp_path / "elsewhere"
    await ended(store, folder, "links", "linked")
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (folder / "links" / "out").symlink_to(elsewhere)
    (folder / "linked").rename(tmp_path / "moved")
    (folder / "linked").symlink_to(tmp_path / "moved")
    for job_id in ("..", ".", "../../elsewhere", str(elsewhere)):  # ids that no server of ours has given
        job = make_job(job_id, JobState.FAILED)
        await store.add(msgspec.structs.replace(job, completed_at=NOON))
    retention = Retention(PoolSettings(retention_jobs=0), store, lambda deleted: None, folder)
    assert await retention.delete_expired(NOON) == 6
    assert await left(store, folder) == []
    assert (elsewhere / "precious").exists()
    assert (tmp_path / "moved" / "results" / "scores.json").exists()


async def test_a_folder_that_cannot_be_looked_at_does_not_keep_the_others(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "jobs"
    await ended(store, folder, "a")
    unreadable = "x" * 300  # which no file system takes for a name
    await store.add(msgspec.structs.replace(make_job(unreadable, JobState.FAILED), completed_at=NOON))
    retention = Retention(PoolSettings(retention_jobs=0), store, lambda deleted: None, folder)
    assert await retention.delete_expired(NOON) == 2
    assert await left(store, folder) == []
    assert "cannot be deleted" in caplog.text


async def test_files_that_cannot_be_deleted_do_not_keep_the_others(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "jobs"
    await ended(store, folder, "a", "b")
    for path in sorted((folder / "a").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "a").rmdir()
    (folder / "a").touch()  # a file where a folder should be
    retention = Retention(PoolSettings(retention_jobs=0), store, lambda deleted: None, folder)
    assert await retention.delete_expired(NOON) == 2
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert f"{folder / 'a'} cannot be deleted" in caplog.text
