"""Videos in the running service: the model that reads digits says of frames what it says of the same pictures."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pytest
from digits import GENERATION, MODEL, held_out, image_bytes
from evalpool_server import run_server
from image_tasks import SIDE, write_task
from PIL import Image
from service import Json, Service

from gpu_pool.evaluator.task_index import LMMS_EVAL_ROOT
from server.client import EvalError

COUNT = 10
CHAT: dict[str, Any] = {"apply_chat_template": True, "model_args": {"dtype": "float32", "num_frames": 2}}


def film(images: list[Image.Image]) -> bytes:
    """A file of these frames, without loss."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "bgr0"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def json_lines(path: Path, rows: list[Json]) -> Json:
    """A file of these rows, as a task's data set."""
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}


def write_tasks(folder: Path) -> Path:
    """Films of three digits each, by path and in Parquet; the first and the last picture of each; damaged films."""
    (folder / "films").mkdir(parents=True)
    pairs = held_out(COUNT + 2)
    films: list[Json] = []
    pictures: list[Json] = []
    stored: list[Json] = []
    for number in range(COUNT):
        shown = [image for image, _ in pairs[number : number + 3]]
        (folder / "films" / f"{number}.mkv").write_bytes(film(shown))
        digit = pairs[number][1]
        films.append({"video": f"films/{number}.mkv", "digit": digit})
        for place, image in (("first", shown[0]), ("last", shown[2])):
            (folder / "films" / f"{number}-{place}.png").write_bytes(image_bytes(image))
        names = {place: f"films/{number}-{place}.png" for place in ("first", "last")}
        pictures.append({**names, "digit": digit})
        stored.append({"video": {"bytes": film(shown), "path": None}, "digit": digit})
    question = "Which digit is this?"
    videos = GENERATION | {"doc_to_image": None, "doc_to_video": "video", "doc_to_text": f"<video>{question}"}
    write_task(folder, "films", folder, videos | json_lines(folder / "films.jsonl", films))
    both = GENERATION | {"doc_to_image": ["first", "last"], "doc_to_text": f"<image><image>{question}"}
    write_task(folder, "pictures", folder, both | json_lines(folder / "pictures.jsonl", pictures))
    datasets.Dataset.from_list(stored).to_parquet(folder / "stored.parquet")
    write_task(folder, "stored", folder / "stored.parquet", videos)
    (folder / "films" / "cut.mkv").write_bytes(film([pairs[0][0]])[:300])
    (folder / "films" / "text.mkv").write_bytes(b"<html>")
    damaged = [films[0], *({"video": f"films/{name}.mkv", "digit": 1} for name in ("cut", "text", "none"))]
    write_task(folder, "damaged", folder, videos | json_lines(folder / "damaged.jsonl", damaged))
    mixed = {"doc_to_image": ["video"]}
    write_task(folder, "mixed", folder, videos | mixed | json_lines(folder / "films.jsonl", films))
    return folder


def write_mvbench(home: Path, films: Path) -> Path:
    """Local data of a task of lmms-eval, the films in the folder of HF_HOME that it looks into; one is not there."""
    place = home / "mvbench_video" / "ssv2_video_mp4"
    place.mkdir(parents=True)
    for number in range(2):
        shutil.copy(films / f"{number}.mkv", place)
    choices = {"candidates": ["one", "two"], "answer": "one", "question": "Which digit is it?"}
    rows = [{"video": f"{number}.mkv", **choices} for number in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(home / "train.parquet")
    root = f'"OpenGVLab/MVBench:action_antonym" = "{home / "train.parquet"}"'
    (home / "evalpool.toml").write_text(f"[dataset_roots]\n{root}\n")
    return home / "evalpool.toml"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """One CPU worker."""
    folder = tmp_path_factory.mktemp("box")
    tasks = write_tasks(folder / "tasks")
    settings = write_mvbench(folder / "hub", tasks / "films")
    arguments = ("--config", settings, "--include-path", tasks, "--cpu-workers", 1)
    home = {"HF_HOME": str(folder / "hub")}
    with run_server(folder / "data", *arguments, variables=home) as server, Service(server) as service:
        yield service


def answers_of(box: Service, job: Json, task: str) -> list[str]:
    samples = sorted(box.client.samples(job["job_id"], task), key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def test_frames_are_shown_as_the_same_pictures_are(box: Service) -> None:
    job = box.finished(box.submit(MODEL, "films", "pictures", "stored", **CHAT))
    pictures = answers_of(box, job, "pictures")
    assert len(set(pictures)) > 1
    assert answers_of(box, job, "films") == pictures
    assert answers_of(box, job, "stored") == pictures


@pytest.mark.skipif(LMMS_EVAL_ROOT is None, reason="lmms-eval is not installed")
def test_a_task_of_lmms_eval(box: Service) -> None:
    options = {"model_args": {"dtype": "float32", "num_frames": 3}, "max_error_share": 0.5}
    job = box.finished(box.submit(MODEL, "mvbench_action_antonym", **options))
    samples = sorted(box.client.samples(job["job_id"], "mvbench_action_antonym"), key=lambda one: one["doc_id"])
    assert ["evalpool_error" in sample for sample in samples] == [False, False, True]
    assert "2.mkv does not exist" in samples[2]["evalpool_error"]
    assert samples[0]["arguments"]["gen_args_0"]["arg_0"].count("<image>") == 3


def test_a_video_that_cannot_be_decoded_is_the_error_of_its_sample(box: Service) -> None:
    job = box.finished(box.submit(MODEL, "damaged", max_error_share=0.8, **CHAT))
    samples = sorted(box.client.samples(job["job_id"], "damaged"), key=lambda sample: sample["doc_id"])
    errors = [sample.get("evalpool_error", "") for sample in samples]
    assert errors[0] == ""
    assert "the video" in errors[1]
    assert "cannot be decoded" in errors[2]
    assert "none.mkv does not exist" in errors[3]


def test_what_cannot_be_shown_is_refused(box: Service, tiny_model: Path) -> None:
    with pytest.raises(EvalError, match="films cannot run: it shows videos, and the model reads text only"):
        box.submit(tiny_model, "films")
    with pytest.raises(EvalError, match="doc_to_image and doc_to_video together"):
        box.submit(MODEL, "mixed")
    with pytest.raises(EvalError, match="must be an integer of at least 1"):
        box.submit(MODEL, "films", model_args={"num_frames": 0})
