"""Jobs that pause for one on several GPUs, on a real server: they go on where they were, and nothing of them is lost.

The GPUs are those of the fake NVML library. What is on one of them computes in truth, on the CPU; the job on two is a
fake that works for as long as the test wants.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from fake_nvml import FakeNvml, gpu_line
from gpu_box import STRANGER, GpuBox, gpu_box, with_weights
from service import Json, until
from tiny_checkpoints import make_tiny

TASKS = ("quick_choice", "long_story")
DOCUMENTS = 250
"""Several seconds of work: what a worker has been asked for is answered before it is given back."""
PATIENCE_SECONDS = 0.5
BOX = (gpu_line(used_mib=512),) * 2


@pytest.fixture(scope="module")
def nvml(fake_nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> FakeNvml:
    nvml = FakeNvml(fake_nvml_library, tmp_path_factory.mktemp("nvml"))
    nvml.write(*BOX)
    return nvml


@pytest.fixture(scope="module")
def box(nvml: FakeNvml, tmp_path_factory: pytest.TempPathFactory) -> Generator[GpuBox]:
    """Two GPUs of 80 GiB."""
    patience = (f"patience_s = {PATIENCE_SECONDS}", "model_patience_s = 3")
    with gpu_box(tmp_path_factory.mktemp("box"), nvml, *patience, evaluators=3, computes=True) as box:
        yield box


@pytest.fixture(scope="module")
def large_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It needs both GPUs, it says."""
    return with_weights(tiny_model, tmp_path_factory.mktemp("large") / "model", gib=100)


@pytest.fixture
def own_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the model that the test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "own-model"))


def begin(box: GpuBox, model: Path) -> tuple[str, str]:
    """Two jobs that have a GPU each: one on the model, and one that does not end by itself."""
    endless = box.submit(model, "long_story", device="cuda", limit=3000, model_args={"max_length": 2000})
    box.answering(endless)
    job = box.submit(model, *TASKS, device="cuda", limit=DOCUMENTS)
    until(lambda: box.workers_of(job), "it has a GPU")
    return job, endless


def pause(box: GpuBox, job: str, endless: str, large_model: Path) -> str:
    """Let the first one pause, once it has answers: for the job on two GPUs that is returned, which works by then."""
    large = box.job_on(large_model, num_gpus=2)
    box.waits(large, "0 of the 2 GPUs")
    box.answering(job)
    box.client.cancel_job(endless)
    box.worker_of(large)
    box.waits(job, f"It has paused for job {large}. 0 of the 2 GPUs", f"(job {large}")
    assert box.job(job)["status"] == "running"
    assert box.job(job)["progress"]["eta_seconds"] is None
    return large


def answers(box: GpuBox, job: str) -> dict[str, list[Json]]:
    return {task: list(box.client.samples(job, task)) for task in TASKS}


def test_a_job_that_pauses_goes_on_where_it_was(box: GpuBox, nvml: FakeNvml, tiny_model: Path, large_model: Path):
    quiet = box.submit(tiny_model, *TASKS, device="cuda", limit=DOCUMENTS)
    undisturbed = box.finished(quiet)
    with nvml.holding():
        job, endless = begin(box, tiny_model)
        large = pause(box, job, endless, large_model)
        done = box.job(job)["progress"]["done"]
        assert 0 < done < undisturbed["progress"]["done"]
    box.finished(large)
    resumed = box.finished(job)
    assert resumed["attempt"] == 1
    assert resumed["metrics"] == undisturbed["metrics"]
    assert len(resumed["progress"]["workers"]) == 2
    assert sum(resumed["progress"]["workers"].values()) == sum(undisturbed["progress"]["workers"].values())
    before, after = answers(box, quiet), answers(box, job)
    for task in TASKS:
        assert [sample["doc"] for sample in after[task]] == [sample["doc"] for sample in before[task]]
    texts = [[sample["filtered_resps"] for sample in found["long_story"]] for found in (before, after)]
    assert texts[0] == texts[1]
    scores = [
        [float(response[0]) for sample in found["quick_choice"] for response in sample["filtered_resps"]]
        for found in (before, after)
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_a_job_whose_model_vanishes_while_it_pauses(box: GpuBox, nvml: FakeNvml, own_model: Path, large_model: Path):
    with nvml.holding():
        job, endless = begin(box, own_model)
        large = pause(box, job, endless, large_model)
        shutil.rmtree(own_model)
    box.finished(large)
    failed = box.ended(job)
    assert failed["status"] == "failed"
    assert f"{own_model} does not exist on the server" in failed["error"]
    assert "its files have not changed for 3 s (setting model_patience_s)" in failed["error"]
    causes = [event["cause"] for event in box.client.events(job)["events"] if event["event"] == "requeued"]
    assert causes == [f"the model's files changed while it paused for job {large}"]


def test_a_job_whose_model_is_overwritten_while_it_pauses(
    box: GpuBox, nvml: FakeNvml, own_model: Path, large_model: Path
):
    """Its scores are all of what the folder holds when it begins anew, and its history says why."""
    with nvml.holding():
        job, endless = begin(box, own_model)
        before = box.job(job)["model"]["fingerprint"]
        large = pause(box, job, endless, large_model)
        make_tiny("model", own_model, "1")
    box.finished(large)
    again = box.finished(job)
    other = box.finished(box.submit(own_model, "quick_choice", device="cuda", limit=4))
    assert again["model"]["fingerprint"] == other["model"]["fingerprint"] != before
    assert again["attempt"] == 2
    assert again["progress"]["done"] == again["progress"]["total"]
    assert len(again["progress"]["workers"]) == 1
    causes = [event["cause"] for event in box.client.events(job)["events"] if event["event"] == "requeued"]
    assert causes == [f"the model's files changed while it paused for job {large}"]


def test_a_job_whose_model_could_not_be_loaded_again_is_waited_for(
    box: GpuBox, nvml: FakeNvml, own_model: Path, large_model: Path
):
    job, endless = begin(box, own_model)
    box.answering(job)
    shutil.rmtree(own_model)
    large = box.job_on(large_model, num_gpus=2)
    box.waits(large, "0 of the 2 GPUs")
    nvml.write(*BOX, f"proc 0 {STRANGER} 2048")
    until(lambda: str(STRANGER) in box.log(), "the box has been looked at, and the models with it")
    nvml.write(*BOX)
    box.client.cancel_job(endless)
    finished = box.finished(job)
    assert (finished["attempt"], len(finished["progress"]["workers"])) == (1, 1)
    box.finished(large)
