"""The file of the job database is deleted, replaced or moved while it is open."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

import pytest
from databases import make_job

from gpu_pool.errors import DatabaseUnavailable
from gpu_pool.records import JobState
from gpu_pool.store import Store


async def test_a_deleted_file_takes_no_job_and_none_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    file = tmp_path / "jobs.sqlite"
    store = await Store.open(file)
    await store.add(make_job("before"))
    for path in tmp_path.glob("jobs.sqlite*"):
        path.unlink()
    change = asyncio.create_task(store.change_state("before", JobState.QUEUED, JobState.CANCELLED))
    with pytest.raises(DatabaseUnavailable, match=f"{file} was deleted or replaced .* Nothing was changed") as refused:
        await store.add(make_job("after"))
    assert not change.done()
    assert refused.value.reason == store.trouble
    [saved] = tmp_path.glob("jobs.sqlite.saved-*")
    assert f"stop the server, move {saved}," in refused.value.reason
    assert [record.getMessage() for record in caplog.records if "stop the server" in record.getMessage()]
    store.give_up()
    with pytest.raises(DatabaseUnavailable):
        await change
    await store.close()

    saved.rename(file)
    store = await Store.open(file)
    assert [job.id for job in await store.unfinished()] == ["before"]
    assert store.trouble is None
    await store.close()


async def test_it_is_noticed_while_nothing_is_written_and_goes_on_once_it_is_back(tmp_path: Path) -> None:
    file, away = tmp_path / "jobs.sqlite", tmp_path / "away"
    store = await Store.open(file)
    await store.add(make_job("before"))
    file.rename(away)
    shutil.copy(away, file)
    assert store.trouble is None
    await store.look()
    assert "was deleted or replaced" in (store.trouble or "")
    change = asyncio.create_task(store.change_state("before", JobState.QUEUED, JobState.CANCELLED))
    away.rename(file)
    assert await change
    assert store.trouble is None
    await store.add(make_job("after"))
    await store.close()
