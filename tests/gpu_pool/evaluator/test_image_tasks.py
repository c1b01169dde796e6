"""Tasks with images as they reach the workers: prompts, digests, examples with images of their own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import datasets
import pytest
from digits import CHOICE, GENERATION, MODEL, held_out, image_bytes, write_documents, write_task

from gpu_pool.evaluator import harness_lm_eval as harness
from gpu_pool.evaluator import images
from gpu_pool.evaluator.catalogue import TaskLibrary
from gpu_pool.evaluator.disk_room import DiskRoom
from gpu_pool.evaluator.media_files import MediaFiles
from gpu_pool.evaluator.media_prompts import MediaPrompts
from gpu_pool.evaluator.prompts import PromptEncoder
from gpu_pool.evaluator.requests import RequestBuilder, TaskRequests, Unit
from gpu_pool.records import Evaluation, Modality, ModelArgs, ModelSpec

QUESTION = "<image>Which digit is this?"
ASKED = "User:<image> Which digit is this?<end_of_utterance>\n"
DOCUMENTS = 6

Build = Callable[..., TaskRequests]


@pytest.fixture
def files(tmp_path: Path) -> Generator[MediaFiles]:
    files = MediaFiles(tmp_path, DiskRoom(lambda what: None))
    yield files
    files.close()


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, str]:
    """A little of the data sets of two stock tasks, as the hub has them."""
    files = [{"bytes": image_bytes(image), "path": None} for image, _ in held_out(3)]
    options = {"options": "['red', 'green']", "answer": "B", "question_type": "multiple-choice"}
    mmmu = {f"image_{number}": files[number - 1] if number < 4 else None for number in range(1, 8)}
    question = "Is <image 2> like <image 1>, or like <image 2>?"
    write_rows(tmp_path / "mmmu" / "Art" / "validation.parquet", {"question": question, **options, **mmmu}, list(mmmu))
    chart = {"query": "How many?", "label": ["7"], "image": files[0]}
    write_rows(tmp_path / "chartqa" / "test.parquet", chart, ["image"])
    return {"MMMU/MMMU": f"{tmp_path}/mmmu/{{config}}", "HuggingFaceM4/ChartQA": f"{tmp_path}/chartqa"}


def write_rows(path: Path, row: dict[str, Any], columns: list[str]) -> None:
    """A Parquet file of one document whose `columns` hold images."""
    path.parent.mkdir(parents=True)
    data = datasets.Dataset.from_list([row])
    for column in columns:
        data = data.cast_column(column, datasets.Image())
    data.to_parquet(path)


@pytest.fixture
def build(
    tmp_path: Path, data_dir: Path, files: MediaFiles, roots: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Build:
    """`build("name", chat=True, num_fewshot=2, args={"max_images": 1})`: the requests of a task."""
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)
    monkeypatch.setattr(datasets.Image, "decode_example", datasets.Image.decode_example)
    images.leave_undecoded()
    pairs = held_out(DOCUMENTS)
    data = tmp_path / "digits.parquet"
    write_documents(data, [image_bytes(image) for image, _ in pairs], [digit for _, digit in pairs], [QUESTION] * 6)
    shots = {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    write_task(tmp_path / "tasks", "generated", data, GENERATION | shots)
    write_task(tmp_path / "tasks", "chosen", data, CHOICE | shots)
    library = TaskLibrary(data_dir, (str(tmp_path / "tasks"),), roots, False)

    def make(name: str, chat: bool = False, args: dict[str, Any] | None = None, **options: Any) -> TaskRequests:
        assert library.check([name], modalities={"text", "image", "video"}) == ()
        model = ModelArgs(pretrained=str(MODEL), **(args or {}))
        encoder = PromptEncoder(model)
        assert "image" in encoder.modalities
        evaluation = Evaluation(model="m", tasks=(name,), apply_chat_template=chat, **options)
        spec = ModelSpec(kind="hf", args=model, fingerprint="f")
        builder = RequestBuilder(spec, encoder, 0, MediaPrompts(files, encoder))
        [task] = library.load([name])["tasks"].values()
        kinds: set[Modality] = {"text", "image", "video"}
        harness.configure_task(name, task, evaluation, False, modalities=kinds, max_images=encoder.max_images)
        template = (lambda *turns, **how: encoder.apply_chat_template(True, *turns, **how)) if chat else None
        requests = TaskRequests()
        for instances in harness.build_instances(task, evaluation, template, harness.portions(is_first=True)):
            requests.responses.extend(builder.build(instances, is_chat=chat).responses)
        return requests

    return make


def units_of(requests: TaskRequests) -> list[Unit]:
    return list(requests.units())


def test_a_prompt_and_its_image(build: Build, files: MediaFiles) -> None:
    units = units_of(build("generated", chat=True))
    assert {unit.shown.text for unit in units if unit.shown} == {f"<|im_start|>{ASKED}Assistant:"}
    expected = [image_bytes(image) for image, _ in held_out(DOCUMENTS)]
    assert [[files.read(digest) for digest in unit.shown.media] for unit in units if unit.shown] == [
        [file] for file in expected
    ]
    assert len({unit.key for unit in units}) == DOCUMENTS


def test_without_a_chat_template_the_model_s_own_string_stands_for_an_image(build: Build) -> None:
    units = units_of(build("generated", args={"image_string": "<row_1_col_1>"}))
    assert {unit.shown.text for unit in units if unit.shown} == {"<row_1_col_1>Which digit is this?"}


def test_choices_share_the_prompt(build: Build) -> None:
    units = units_of(build("chosen", chat=True))
    assert len(units) == 10 * DOCUMENTS
    assert len({unit.shown for unit in units}) == DOCUMENTS
    assert {unit.kind for unit in units} == {"loglikelihood with media"}
    assert all(len(unit.continuation) for unit in units)


@pytest.mark.parametrize("multiturn", [True, False])
def test_examples_show_their_images_before_the_question(build: Build, files: MediaFiles, multiturn: bool) -> None:
    units = units_of(build("generated", chat=True, num_fewshot=2, fewshot_as_multiturn=multiturn))
    shown = [unit.shown for unit in units if unit.shown]
    assert {prompt.text.count("<image>") for prompt in shown} == {3}
    expected = [image_bytes(image) for image, _ in held_out(DOCUMENTS)]
    assert [files.read(digest) for digest in shown[5].media] == [expected[0], expected[1], expected[5]]
    assert [files.read(digest) for digest in shown[0].media] == [expected[1], expected[2], expected[0]]


def test_system_prompts(build: Build) -> None:
    units = units_of(build("generated", chat=True, system_instruction="Be brief."))
    expected = f"<|im_start|>System: Be brief.<end_of_utterance>\n{ASKED}Assistant:"
    assert {unit.shown.text for unit in units if unit.shown} == {expected}


@pytest.mark.parametrize(("most", "places"), [(3, [0, 1, 5]), (2, [1, 5]), (1, [5])])
@pytest.mark.parametrize("form", [{"fewshot_as_multiturn": True}, {"fewshot_as_multiturn": False}, {"chat": False}])
def test_no_more_images_than_wanted_and_the_question_s_before_all(
    build: Build, files: MediaFiles, form: dict[str, Any], most: int, places: list[int]
) -> None:
    args = {"max_images": most, "image_string": "<image>"}
    units = units_of(build("generated", **{"chat": True, "num_fewshot": 2, "args": args, **form}))
    shown = [unit.shown for unit in units if unit.shown]
    assert {prompt.text.count("<image>") for prompt in shown} == {most}
    expected = [image_bytes(image) for image, _ in held_out(DOCUMENTS)]
    assert [files.read(digest) for digest in shown[5].media] == [expected[place] for place in places]
    assert shown[5].text.count("Which digit is this?") == 3


def test_memory_holds_no_images_of_what_was_built(build: Build) -> None:
    requests = build("chosen", chat=True)
    for instance, _ in requests.responses:
        assert set(instance.doc["image"]) == {"path", "sha256", "bytes"}
        [image] = instance.args[2]["visual"]
        assert set(image) == {"path", "sha256", "bytes"}


def test_stock_tasks(build: Build, files: MediaFiles) -> None:
    expected = [image_bytes(image) for image, _ in held_out(3)]
    [mmmu] = [unit.shown for unit in units_of(build("mmmu_val_art", chat=True)) if unit.shown]
    assert [files.read(digest) for digest in mmmu.media] == [expected[1], expected[0], expected[1]]
    assert "Is <image>  like <image> , or like <image> ?" in mmmu.text
    [chart] = [unit.shown for unit in units_of(build("chartqa", chat=True)) if unit.shown]
    assert [files.read(digest) for digest in chart.media] == expected[:1]
    assert "How many?" in chart.text
