"""Models that read images in the running service: a real one that reads digits, on digits that it has not seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest
from digits import (
    ACCURACY,
    CHOICE,
    GENERATION,
    MODEL,
    QUESTION,
    held_out,
    image_bytes,
    write_digits,
    write_documents,
    write_task,
)
from evalpool_server import run_server
from PIL import Image
from service import Json, Service

from server.client import EvalError

DIGITS = ("digits", "digits_choice")
CHAT = {"apply_chat_template": True, "model_args": {"dtype": "float32"}}


OPENING = """
from pathlib import Path

from PIL import Image


def opened(doc):
    return [Image.open(Path({folder!r}) / doc["image"]).convert("RGB")]


def converted(doc):
    return [doc["image"] and doc["image"].convert("L").convert("RGB")]
"""
"""Tasks' own code that opens or decodes images itself."""


def write_blank(folder: Path) -> None:
    """The tasks of digits over images that show nothing."""
    pairs = held_out()
    files = [image_bytes(Image.new("RGB", image.size)) for image, _ in pairs]
    data = folder / "blank.parquet"
    write_documents(data, files, [digit for _, digit in pairs], [QUESTION] * len(pairs))
    write_task(folder, "blank", data, GENERATION)
    write_task(folder, "blank_choice", data, CHOICE)


def write_damaged(folder: Path) -> None:
    """Twenty digits as they are, and five that cannot be shown, in a data set and as files beside a JSON lines file."""
    pairs = held_out(25)
    files: list[bytes | None] = [image_bytes(image) for image, _ in pairs]
    damaged = [files[20][:-40], b"", b"<html>", image_bytes(Image.new("1", (20_000, 5_000))), None]
    files[20:] = damaged
    digits = [digit for _, digit in pairs]
    data = folder / "damaged.parquet"
    write_documents(data, files, digits, [QUESTION] * len(pairs))
    write_task(folder, "damaged", data, GENERATION)
    write_task(folder, "damaged_choice", data, CHOICE)
    (folder / "pictures").mkdir()
    lines: list[str] = []
    for place, (file, digit) in enumerate(zip(files, digits, strict=True)):
        if file is not None:
            (folder / "pictures" / f"{place}.png").write_bytes(file)
        lines.append(json.dumps({"image": f"pictures/{place}.png", "digit": digit, "question": QUESTION}))
    (folder / "listed.jsonl").write_text("\n".join(lines))
    listed = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "listed.jsonl")}}}
    write_task(folder, "listed", data, GENERATION | listed)
    (folder / "opening.py").write_text(OPENING.format(folder=str(folder)))
    for name, source in {"opened": listed, "converted": {}}.items():
        write_task(folder, name, data, {**GENERATION, **source, "doc_to_image": None})
        config = folder / f"{name}.yaml"
        shown = f"doc_to_image: !function opening.{name}"
        config.write_text(config.read_text().replace("doc_to_image: null", shown))


def write_folder(folder: Path) -> None:
    """Two of each digit as a folder of images for each, as `datasets` reads them."""
    for place, (image, digit) in enumerate(held_out()):
        path = folder / "by_digit" / str(digit) / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(list(path.parent.iterdir())) < 2:
            path.write_bytes(image_bytes(image))
    source = {
        "dataset_path": "imagefolder",
        "dataset_kwargs": {"data_dir": str(folder / "by_digit")},
        "test_split": "train",
        "doc_to_text": QUESTION,
        "doc_to_target": "{{label}}",
    }
    write_task(folder, "folder", folder, GENERATION | source)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """Two CPU workers."""
    folder = tmp_path_factory.mktemp("box")
    tasks = write_digits(folder / "tasks")
    write_blank(tasks)
    write_damaged(tasks)
    write_folder(tasks)
    write_mixed(tasks)
    text = {"doc_to_image": None, "doc_to_text": "Is {{digit}} a digit?", "doc_to_choice": ["yes", "no"]}
    write_task(tasks, "text_only", tasks / "blank.parquet", CHOICE | text | {"doc_to_target": 0})
    arguments = ("--include-path", tasks, "--cpu-workers", 2)
    with run_server(folder / "data", *arguments) as server, Service(server) as service:
        yield service


QUESTIONS_OF_ALL_LENGTHS = (QUESTION, QUESTION + " Say only its name, as short as you can, and nothing else." * 6)


def write_mixed(folder: Path) -> None:
    """Digits in pictures of four sizes, after questions of two lengths."""
    pairs = held_out(40)
    sizes = ((32, 32), (64, 32), (20, 48), (150, 90))
    files = [image_bytes(image.resize(sizes[place % len(sizes)])) for place, (image, _) in enumerate(pairs)]
    questions = [QUESTIONS_OF_ALL_LENGTHS[place // len(sizes) % 2] for place in range(len(pairs))]
    data = folder / "mixed.parquet"
    write_documents(data, files, [digit for _, digit in pairs], questions)
    write_task(folder, "mixed", data, GENERATION)
    write_task(folder, "mixed_choice", data, CHOICE)


@pytest.fixture(scope="module")
def whole(box: Service) -> Json:
    """A job over all digits, on two workers, in batches of the engine's choice."""
    return box.finished(box.submit(MODEL, *DIGITS, num_gpus=2, **CHAT))


def test_the_model_scores_what_it_scores(whole: Json) -> None:
    assert whole["metrics"]["digits"]["exact_match,digit"] == pytest.approx(ACCURACY, abs=1e-4)
    assert whole["metrics"]["digits_choice"]["acc,none"] == pytest.approx(ACCURACY, abs=1e-4)


@pytest.mark.parametrize(("batch_size", "num_gpus"), [(1, 1), (8, 2), ("auto", 1)])
def test_answers_do_not_depend_on_company(box: Service, whole: Json, batch_size: int | str, num_gpus: int) -> None:
    job = box.finished(box.submit(MODEL, *DIGITS, batch_size=batch_size, num_gpus=num_gpus, limit=40, **CHAT))
    for task in DIGITS:
        for one, other in zip(samples_of(box, job, task), samples_of(box, whole, task)[:40], strict=True):
            if task == "digits":
                assert one["resps"] == other["resps"]
            else:
                assert likelihoods(one) == pytest.approx(likelihoods(other), rel=1e-5, abs=1e-5)


def test_blank_images_fall_to_chance(box: Service) -> None:
    job = box.finished(box.submit(MODEL, "blank", "blank_choice", **CHAT))
    for metrics in (job["metrics"]["blank"]["exact_match,digit"], job["metrics"]["blank_choice"]["acc,none"]):
        assert metrics < 0.2


def test_an_image_that_cannot_be_shown_is_the_error_of_its_sample(box: Service) -> None:
    tasks = ("damaged", "damaged_choice", "listed")
    job = box.finished(box.submit(MODEL, *tasks, max_error_share=0.3, **CHAT))
    assert job["metrics"]["damaged"]["evalpool_errored"] == 5
    assert job["metrics"]["damaged_choice"]["evalpool_errored"] == 50
    assert job["metrics"]["listed"]["evalpool_errored"] == 5
    causes = ["cannot be decoded", "empty", "no image", "pixels, more than"]
    for task, last in (("damaged", "no images were passed"), ("listed", "24.png does not exist")):
        samples = samples_of(box, job, task)
        assert all("exact_match" in sample for sample in samples[:20])
        for sample, cause in zip(samples[20:], [*causes, last], strict=True):
            assert cause in sample["evalpool_error"]
    assert job["metrics"]["damaged"]["exact_match,digit"] > 0.9
    assert "sha256" in samples_of(box, job, "damaged")[0]["doc"]["image"]


def test_an_image_that_a_task_s_own_code_cannot_open_is_the_error_of_its_sample(box: Service) -> None:
    job = box.finished(box.submit(MODEL, "opened", "converted", max_error_share=0.3, **CHAT))
    for task in ("opened", "converted"):
        assert job["metrics"][task]["evalpool_errored"] == 5
        assert job["metrics"][task]["exact_match,digit"] > 0.9
    causes = ["truncated", "UnidentifiedImageError", "UnidentifiedImageError", "pixels, more than", "FileNotFoundError"]
    for sample, cause in zip(samples_of(box, job, "opened")[20:], causes, strict=True):
        assert cause in sample["evalpool_error"]


def test_a_job_with_a_damaged_image_fails_where_no_error_is_allowed(box: Service) -> None:
    job = box.ended(box.submit(MODEL, "damaged", **CHAT))
    assert job["status"] == "failed"
    assert "more than max_error_share 0 allows" in job["error"]


def test_a_folder_of_images(box: Service) -> None:
    job = box.finished(box.submit(MODEL, "folder", **CHAT))
    assert job["metrics"]["folder"]["exact_match,digit"] > 0.9


def test_answers_with_images_come_from_the_cache(box: Service) -> None:
    first = box.finished(box.submit(MODEL, "folder", use_cache=True, **CHAT))
    second = box.finished(box.submit(MODEL, "folder", use_cache=True, **CHAT))
    assert second["progress"]["cached"] == second["progress"]["total"] == 20
    assert second["metrics"] == first["metrics"]


def test_a_model_of_text_is_refused_tasks_with_images(box: Service, tiny_model: Path) -> None:
    with pytest.raises(EvalError, match="reads text only"):
        box.submit(tiny_model, "digits")


def test_a_job_fails_once_and_says_why_its_processor_cannot_be_loaded(box: Service, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = model / "processor_config.json"
    config.write_text(config.read_text().replace("Idefics3ImageProcessor", "UnheardOfImageProcessor"))
    job = box.ended(box.submit(model, "digits", max_error_share=1, limit=20, **CHAT))
    assert job["status"] == "failed"
    assert "the model's processor cannot be loaded" in job["error"]
    assert "Unrecognized image processor" in job["error"]


def test_a_model_that_reads_images_is_asked_tasks_of_text(box: Service) -> None:
    job = box.finished(box.submit(MODEL, "text_only", limit=20, **CHAT))
    assert job["metrics"]["text_only"]["acc,none"] >= 0


def test_images_of_all_sizes_after_questions_of_all_lengths(box: Service) -> None:
    """In one batch or each alone, on one worker or two: the same answers."""
    together, alone = (
        box.finished(
            box.submit(MODEL, "mixed", "mixed_choice", batch_size=size, num_gpus=workers, use_cache=False, **CHAT)
        )
        for size, workers in ((16, 2), (1, 1))
    )
    for one, other in zip(samples_of(box, together, "mixed"), samples_of(box, alone, "mixed"), strict=True):
        assert one["resps"] == other["resps"]
    for one, other in zip(*(samples_of(box, job, "mixed_choice") for job in (together, alone)), strict=True):
        assert likelihoods(one) == pytest.approx(likelihoods(other), rel=1e-5, abs=1e-5)
    assert len({str(one["resps"]) for one in samples_of(box, alone, "mixed")}) > 3


def samples_of(box: Service, job: Json, task: str) -> list[Json]:
    return sorted(box.client.samples(job["job_id"], task), key=lambda sample: sample["doc_id"])


def likelihoods(sample: Json) -> list[float]:
    """Of the choices."""
    return [float(value) for value, _ in sample["filtered_resps"]]
