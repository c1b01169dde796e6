"""Over REST and on the command line: a job's events, tags, idempotency keys, and the db commands."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from fake_pool import FakePool

from gpu_pool.records import JobState

ROOT = Path(__file__).parents[2]


async def submit(api: Any, **fields: Any) -> Any:
    return await api.post("/evaluate", json={"model": "hf", "tasks": ["piqa"], **fields})


async def test_events(api: Any, fake_pool: FakePool) -> None:
    job_id = (await submit(api)).json()["job_id"]
    fake_pool.change(job_id, state=JobState.RUNNING, attempt=1)
    fake_pool.change(job_id, state=JobState.FAILED, error="no memory")
    answer = (await api.get(f"/jobs/{job_id}/events")).json()
    told = [(each["event"], each["status"], each["attempt"], each["cause"]) for each in answer["events"]]
    assert told == [
        ("submitted", "queued", 0, None),
        ("started", "running", 1, None),
        ("failed", "failed", 1, "no memory"),
    ]
    assert (await api.get("/jobs/nope/events")).status_code == 404


async def test_tags_are_shown_and_found(api: Any) -> None:
    for tags in (["a"], ["a", "b"], ["b"], []):
        await submit(api, tags=tags)

    async def found(query: str) -> list[list[str]]:
        return [job["tags"] for job in (await api.get(f"/jobs{query}")).json()["jobs"]]

    assert await found("?tag=a") == [["a", "b"], ["a"]]
    assert await found("?tag=a&tag=b") == [["a", "b"]]
    assert await found("?tag=c") == []
    assert len(await found("")) == 4


async def test_the_same_key_means_the_same_job(api: Any, fake_pool: FakePool) -> None:
    first = (await submit(api, idempotency_key="k", limit=3)).json()
    again = await submit(api, idempotency_key="k", limit=3)
    assert (again.status_code, again.json()["job_id"]) == (200, first["job_id"])
    fake_pool.change(first["job_id"], state=JobState.COMPLETED)
    assert (await submit(api, idempotency_key="k", limit=3)).json()["status"] == "completed"
    other = await submit(api, idempotency_key="k", limit=4)
    assert other.status_code == 409
    assert other.json()["errors"][0]["field"] == "idempotency_key"
    assert len((await api.get("/jobs")).json()["jobs"]) == 1


async def test_a_pool_in_trouble_is_not_healthy(api: Any, fake_pool: FakePool) -> None:
    fake_pool._trouble = "the job database cannot be used: its disk is full"
    health = (await api.get("/health")).json()
    assert (health["status"], health["trouble"]) == ("degraded", fake_pool._trouble)


def db(command: str, data_dir: Path) -> tuple[int, str]:
    ran = subprocess.run(
        [sys.executable, "-m", "server", "db", command, "--data-dir", data_dir],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_checking_and_upgrading_the_database(tmp_path: Path) -> None:
    status, said = db("check", tmp_path)
    assert (status, "there is no database yet" in said) == (1, True)
    assert not (tmp_path / "jobs.sqlite").exists()
    assert db("upgrade", tmp_path)[0] == 0
    assert db("check", tmp_path)[0] == 0
    status, said = db("upgrade", tmp_path)
    assert (status, "up to date already" in said) == (0, True)
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    status, said = db("check", tmp_path)
    assert (status, "a newer evalpool" in said) == (1, True)
    status, said = db("upgrade", tmp_path)
    assert (status, said.startswith("error: the database was changed by a newer evalpool")) == (2, True)
    assert said.count("\n") == 1
