"""What comes of jobs before the scheduler has them: whatever is wrong with what they name, none waits for ever."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from intake_box import IntakeBox, intake_box, make_evaluation_job

from gpu_pool import store
from gpu_pool.admission import Admission
from gpu_pool.database import Database
from gpu_pool.errors import DatabaseUnavailable
from gpu_pool.model_size import ReplicaSize
from gpu_pool.records import Evaluation, JobState, ModelArgs

ROOT = Path(__file__).parents[2]


class Surprised(Admission):
    """Meets a file at the step `fails` that nobody has thought of."""

    fails = "size"

    async def model_args(self, evaluation: Evaluation, path: str | None = None, *, is_merged: bool = True) -> ModelArgs:
        if self.fails == "model":
            raise OverflowError("a number in its configuration")
        return await super().model_args(evaluation, path, is_merged=is_merged)

    async def size(self, *_: object) -> ReplicaSize | None:
        raise OverflowError("a number in its configuration")


@pytest.mark.parametrize("fails", ["model", "size"])
async def test_a_model_that_cannot_be_looked_at_ends_its_job(fails: str, tiny_model: Path, tmp_path: Path) -> None:
    async with intake_box(tmp_path, admission=Surprised) as box:
        box.intake._admission.fails = fails
        job = make_evaluation_job("j", tiny_model)
        await box.add(job)
        box.intake.take_up(job)
        while (ended := await box.store.get("j")).state is JobState.QUEUED:
            await asyncio.sleep(0)
    assert ended.state is JobState.FAILED
    assert "a number in its configuration" in (ended.error or "")


READER = """
import asyncio, os, sys
from pathlib import Path
sys.path += sys.argv[2:]
from intake_box import intake_box, make_evaluation_job

def reading() -> int:
    opened = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return sum(path.endswith("model.safetensors") for path in opened)

async def main():
    async with intake_box(Path(sys.argv[1])) as box:
        for number, model in enumerate(Path(sys.argv[1]).glob("model-*")):
            job = make_evaluation_job(str(number), model)
            await box.add(job)
            box.intake.take_up(job)
        while reading() < 2:
            await asyncio.sleep(0.01)
        for _ in range(100):
            await asyncio.to_thread(int)
        print("others have their turn", reading())

asyncio.run(main())
"""


def test_reading_many_models_keeps_neither_others_nor_the_end_waiting(tmp_path: Path) -> None:
    """Each would take an hour."""
    for number in range(40):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        (folder / "tokenizer.json").touch()
        with (folder / "model.safetensors").open("wb") as weights:
            weights.truncate(1 << 42)
    command = [sys.executable, "-c", READER, str(tmp_path), *sys.path]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "others have their turn 2\n"


async def test_a_restart_says_that_a_job_goes_on_with_another_model(tiny_model: Path, tmp_path: Path) -> None:
    async def interrupt(*models: str) -> None:
        """Start a job on each, and end the server without its knowledge."""
        async with intake_box(tmp_path) as box:
            for model in models:
                await box.add(job := make_evaluation_job(model, shutil.copytree(tiny_model, tmp_path / model)))
                box.intake.take_up(job)
                await given(box, model)
                await box.jobs.start(box.jobs[model])

    await interrupt("overwritten", "same")
    (tmp_path / "overwritten" / "tokenizer.json").write_text("another one")
    async with intake_box(tmp_path) as box:
        before = (await box.store.get("overwritten")).model
        assert before
        await box.intake.recover()
        await given(box, "overwritten", "same")
        after = box.jobs["overwritten"].model
        assert after
        *_, last = await box.store.history("overwritten")
        assert (last.event, last.state, last.attempt) == ("model_changed", JobState.QUEUED, 1)
        assert last.cause == f"attempt 1 was on {before.fingerprint}, and its model is {after.fingerprint} now"
        assert [entry.event for entry in await box.store.history("same")] == ["submitted", "started", "requeued"]


class Moving(Admission):
    """The hub's main branch moves on with each look."""

    commits = itertools.count()

    async def model_args(self, evaluation: Evaluation, path: str | None = None, *, is_merged: bool = True) -> ModelArgs:
        return ModelArgs(pretrained=evaluation.model, revision=f"{next(self.commits):040}")


async def test_a_hub_id_keeps_the_commit_that_it_was_when_it_was_submitted(tmp_path: Path) -> None:
    async with intake_box(tmp_path, admission=Moving) as box:
        await box.add(job := make_evaluation_job("j", "org/name"))
        box.intake.take_up(job)
        await given(box, "j")
        model = box.jobs["j"].model
        assert model
    async with intake_box(tmp_path, admission=Moving) as box:
        await box.intake.recover()
        await given(box, "j")
        assert box.jobs["j"].model == model


async def given(box: IntakeBox, *job_ids: str) -> None:
    """Return when the scheduler has been given these."""
    while not box.runner._given.issuperset(job_ids):
        assert all(job_id in box.jobs for job_id in job_ids), [await box.store.get(job_id) for job_id in job_ids]
        await asyncio.sleep(0)


class Lenient(Admission):
    """Finds nothing wrong with what it cannot ask the desk about."""

    async def admit(self, evaluation: Evaluation) -> None:
        pass


async def test_a_job_whose_commit_was_lost_sight_of_is_taken_up(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.0)
    commit = Database._write
    breaks = iter([True])

    def commit_then_break(self: Database, work: object) -> object:
        result = commit(self, work)
        if next(breaks, False):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
        return result

    async with intake_box(tmp_path, admission=Lenient) as box:
        monkeypatch.setattr(Database, "_write", commit_then_break)
        with pytest.raises(DatabaseUnavailable):
            await box.intake.submit(make_evaluation_job("", tiny_model).evaluation, {})
        while not box.jobs:
            await asyncio.sleep(0)
        await given(box, *box.jobs)
