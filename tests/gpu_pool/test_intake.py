"""What comes of jobs before the scheduler has them: whatever is wrong with what they name, none waits for ever."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from intake_box import IntakeBox, intake_box, make_evaluation_job

from gpu_pool import settling, store
from gpu_pool.admission import Admission
from gpu_pool.database import Database
from gpu_pool.errors import DatabaseUnavailable
from gpu_pool.model_size import ReplicaSize
from gpu_pool.records import Evaluation, JobState, ModelArgs
from gpu_pool.transitions import JobEvent

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


async def test_a_job_that_is_taken_up_anew_has_run_for_as_long_as_before(tmp_path: Path, tiny_model: Path) -> None:
    async with intake_box(tmp_path) as box:
        await box.add(job := make_evaluation_job("j", tiny_model))
        box.intake.take_up(job, 7.0)
        await given(box, "j")
        event, _ = box.runner._events.get_nowait()
        assert event.demand.ran_s == 7.0


async def given(box: IntakeBox, *job_ids: str) -> None:
    """Return when the scheduler has been given these."""
    while not box.runner._given.issuperset(job_ids):
        assert all(job_id in box.jobs for job_id in job_ids), [await box.store.get(job_id) for job_id in job_ids]
        await asyncio.sleep(0)


async def started_before(box: IntakeBox, model: Path) -> None:
    """A job on the model that was admitted and started, and is taken up again."""
    await box.add(job := make_evaluation_job("j", model))
    box.intake.take_up(job)
    await given(box, "j")
    running = await box.jobs.start(box.jobs["j"])
    box.runner._given.discard("j")
    await box.jobs.requeue(running, "its model changed")


async def waits(box: IntakeBox, *words: str) -> None:
    """Return when the job waits because of what these words say."""
    while not all(word in box.intake.waiting("j").reason for word in words):
        assert "j" in box.jobs, (await box.store.get("j")).error
        await asyncio.sleep(0)


def half_written(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"half")
    (model / "config.json").write_text('{"architectures": [')


@pytest.mark.parametrize("spoil", [shutil.rmtree, half_written])
async def test_a_job_waits_for_files_that_are_being_replaced(
    spoil: Callable[[Path], None], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "POLL_SECONDS", 0.01)
    latest = shutil.copytree(tiny_model, tmp_path / "latest")
    async with intake_box(tmp_path) as box:
        await started_before(box, latest)
        spoil(latest)
        box.intake.take_up(box.jobs["j"])
        await waits(box, str(latest), "The job waits until its files change, and fails if they do not for 120 s")
        shutil.copytree(tiny_model, latest, dirs_exist_ok=True)
        (latest / "tokenizer.json").write_text("the next one's")
        await given(box, "j")
        assert [entry.event for entry in await box.store.history("j")][-1] == "model_changed"
        assert not box.intake._settling


async def test_a_job_that_was_to_begin_anew_waits_until_nobody_writes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(settling, "REST_SECONDS", 60.0)
    latest = shutil.copytree(tiny_model, tmp_path / "latest")
    async with intake_box(tmp_path) as box:
        await started_before(box, latest)
        box.intake.take_up(box.jobs["j"])
        await waits(box, "are being written")
        monkeypatch.setattr(settling, "REST_SECONDS", 0.1)
        await given(box, "j")


async def test_files_that_are_gone_for_good_are_waited_for_for_a_stated_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "POLL_SECONDS", 0.01)
    latest = shutil.copytree(tiny_model, tmp_path / "latest")
    async with intake_box(tmp_path, model_patience_s=0.5) as box:
        await started_before(box, latest)
        shutil.rmtree(latest)
        box.intake.take_up(box.jobs["j"])
        while "j" in box.jobs:
            await asyncio.sleep(0)
        job = await box.store.get("j")
    assert job.state is JobState.FAILED
    gone = f"model: {latest} does not exist on the server"
    assert job.error == f"{gone}; its files have not changed for 0.5 s (setting model_patience_s)"


async def test_nobody_looks_for_the_files_of_a_job_that_was_cancelled(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "POLL_SECONDS", 0.01)
    latest = shutil.copytree(tiny_model, tmp_path / "latest")
    async with intake_box(tmp_path) as box:
        await started_before(box, latest)
        shutil.rmtree(latest)
        box.intake.take_up(box.jobs["j"])
        await waits(box, "does not exist")
        await box.runner.settle_queued("j", JobEvent.CANCEL, None)
        while box.runner._tasks:
            await asyncio.sleep(0)
        assert (await box.store.get("j")).state is JobState.CANCELLED


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
