"""Sounds of lmms-eval's tasks whose code decodes them, as it would by torchcodec, and hides what goes wrong."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Generator
from pathlib import Path

import datasets
import numpy as np
import pytest
from sounds import RATE, tone, wav

from gpu_pool.evaluator.catalogue import TaskLibrary
from gpu_pool.evaluator.harness import harness_of
from gpu_pool.evaluator.images import ImageProblem
from gpu_pool.evaluator.sounds import UndecodedSound, leave_sounds_undecoded, media_file
from gpu_pool.evaluator.task_index import LMMS_EVAL_ROOT
from gpu_pool.records import Evaluation
from gpu_pool.sound import decode_sound

pytestmark = pytest.mark.skipif(LMMS_EVAL_ROOT is None, reason="lmms-eval is not installed")

FAMILIES = ("ami", "europal_asr", "song_describer", "voxpopuli", "wenet_speech")
SOUNDS = [wav(tone(0.5, seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Generator[TaskLibrary]:
    folder = tmp_path_factory.mktemp("ami")
    rows = [{"audio": {"bytes": file, "path": None}, "text": "HELLO"} for file in (*SOUNDS, b"damaged")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", datasets.load_dataset)
        for kind, name in itertools.product((datasets.Audio, datasets.Video), ("decode_example", "encode_example")):
            patch.setattr(kind, name, getattr(kind, name))
        leave_sounds_undecoded()
        datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio()).to_parquet(folder / "test.parquet")
        library = TaskLibrary(data_dir, (), {"edinburghcstr/ami:ihm": str(folder)}, False)
        library.load(["ami_test"])  # whose imports the tasks' modules need
        yield library


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_task_that_decodes_a_sound_shows_it(family: str) -> None:
    show = getattr(importlib.import_module(f"lmms_eval.tasks.{family}.utils"), f"{family}_doc_to_audio")
    [shown] = show({"audio": UndecodedSound({"bytes": SOUNDS[0], "path": None})})
    file = media_file(shown, "audio", ())
    assert isinstance(file, bytes)
    heard, expected = decode_sound(file), decode_sound(SOUNDS[0])
    assert heard.sampling_rate == RATE
    assert np.array_equal(heard.samples, expected.samples)


@pytest.mark.usefixtures("library")
def test_samples_have_the_rate_of_their_file() -> None:
    show = importlib.import_module("lmms_eval.tasks.ami.utils").ami_doc_to_audio
    [shown] = show({"audio": UndecodedSound({"bytes": wav(tone(0.5), 8000), "path": None})})
    assert shown["sampling_rate"] == 8000


@pytest.mark.parametrize("with_template", [True, False])
def test_a_sound_that_a_task_could_not_decode_is_an_error_of_its_document(
    library: TaskLibrary, with_template: bool
) -> None:
    task = library.load(["ami_test"])["tasks"]["ami_test"]
    harness = harness_of(task)
    evaluation = Evaluation(model="m", tasks=("ami_test",))
    harness.configure_task("ami_test", task, evaluation, False, modalities={"text", "audio"})
    template = (lambda turns: str(turns)) if with_template else None
    portions = harness.build_instances(task, evaluation, template, itertools.repeat(3))
    *heard, lost = [instance.args[2]["audio"] for instance in itertools.chain.from_iterable(portions)]
    assert [len(shown) for shown in heard] == [1, 1]
    [problem] = lost
    assert isinstance(problem, ImageProblem)
