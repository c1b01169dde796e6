"""lmms-eval's tasks in the catalogue: one name space with lm-eval's, refusals, no import of what is not used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from lmms_data import DOCUMENTS, write_lmms_data

from gpu_pool.evaluator import catalogue, package_files, task_needs
from gpu_pool.evaluator.catalogue import TaskLibrary, UnknownTask
from gpu_pool.evaluator.task_index import LMMS_EVAL_ROOT, to_entries
from gpu_pool.messages import TaskEntry
from gpu_pool.records import Modality

SEES: frozenset[Modality] = frozenset({"text", "image", "video"})

pytestmark = pytest.mark.skipif(LMMS_EVAL_ROOT is None, reason="lmms-eval is not installed")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_lmms_data(tmp_path_factory.mktemp("lmms"))


@pytest.fixture
def library(data_dir: Path, roots: dict[str, str]) -> TaskLibrary:
    return TaskLibrary(data_dir, (), roots, False)


@pytest.fixture
def entries(library: TaskLibrary) -> dict[str, TaskEntry]:
    return {entry.name: entry for entry in library.entries()}


def test_one_name_space(entries: dict[str, TaskEntry]) -> None:
    mme, arc, theirs = entries["mme"], entries["arc_easy"], entries["lmms:arc_easy"]
    assert "lmms:mme" not in entries
    assert (mme.library, mme.modality, mme.output_type, mme.note) == ("lmms-eval", "image", "generate_until", None)
    assert (arc.library, theirs.library) == ("lm-eval", "lmms-eval")
    assert "lmms:arc_easy" in (arc.note or "")
    assert (theirs.modality, theirs.output_type) == ("text", "multiple_choice")
    assert [entry.documents for entry in (mme, arc, theirs)] == [DOCUMENTS] * 3
    assert entries["videomme"].modality == "video"
    assert entries["librispeech_test_clean"].modality == "audio"


@pytest.mark.slow
def test_the_index_is_lmms_evals(library: TaskLibrary) -> None:
    from lmms_eval.tasks import TaskManager

    assert LMMS_EVAL_ROOT is not None
    theirs = TaskManager().task_index
    ours = to_entries([library._indexes[LMMS_EVAL_ROOT]])
    kinds = {"PY_TASK": "python_task", "TASK": "task", "GROUP": "group", "TAG": "tag"}
    assert {name: kinds[entry.kind.name] for name, entry in ours.items()} == {
        name: entry["type"] for name, entry in theirs.items()
    }
    tags = {name: set(entry["task"]) for name, entry in theirs.items() if entry["type"] == "tag"}
    assert tags == {name: entry.tags for name, entry in ours.items() if entry.kind.name == "TAG"}


def reason(library: TaskLibrary, name: str, **model: Any) -> str:
    problems = library.check([name], **model)
    assert [problem.task for problem in problems] == [name]
    return problems[0].reason


def test_what_can_run_has_no_problem(library: TaskLibrary) -> None:
    assert library.check(["mme", "lmms:mmmu_val", "seedbench_ppl", "lmms:arc_easy"], modalities=SEES) == ()


def test_what_the_model_lacks_is_named(library: TaskLibrary) -> None:
    assert "the model reads text only" in reason(library, "lmms:mme")
    assert "shows videos, and the model reads text only" in reason(library, "lmms:videomme")
    assert "plays sounds, and the model reads text and images and videos only" in reason(
        library, "librispeech_test_clean", modalities=SEES
    )
    assert "it plays no sounds" in reason(library, "mme", modalities={"audio"})
    assert "generate_until_agentic is not served" in reason(library, "tau2_bench_telecom")


def test_examples_where_there_are_none_are_refused(library: TaskLibrary) -> None:
    for name in ("mme", "lmms:arc_easy"):
        assert "num_fewshot must be 0" in reason(library, name, modalities=SEES, num_fewshot=2)
        assert library.check([name], modalities=SEES, num_fewshot=0) == ()
    assert task_needs.lmms_task_needs("mine", {"fewshot_config": {"sampler": "first_n"}}).has_examples


def test_missing_libraries_are_named(library: TaskLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_needs, "_is_installed", lambda module: module != "loguru")
    assert "Python libraries that are not installed: loguru" in reason(library, "mme", modalities=SEES)


def test_code_of_the_models_needs_leave(library: TaskLibrary) -> None:
    assert "allow_code_execution" in reason(library, "auxsolidmath_easy", modalities=SEES)


@pytest.mark.parametrize("name", ["llava_in_the_wild", "mmvet", "hallusion_bench_image", "mathvista_testmini_cot"])
def test_judges_need_leave(library: TaskLibrary, data_dir: Path, roots: dict[str, str], name: str) -> None:
    assert "asks a judge over the network" in reason(library, name, modalities=SEES)
    allowed = TaskLibrary(data_dir, (), roots, False, allow_judges=True)
    assert "judge" not in reason(allowed, name, modalities=SEES)  # its data is not here


@pytest.mark.parametrize("name", ["mmstar", "chartqa", "mathvision_test", "voicebench_ifeval"])
def test_what_only_lies_beside_a_judge_needs_none(library: TaskLibrary, name: str) -> None:
    assert "judge" not in reason(library, name, modalities=SEES | {"audio"})


def test_data_that_cannot_be_reached_is_named(library: TaskLibrary) -> None:
    assert "setting `dataset_roots`" in reason(library, "realworldqa", modalities=SEES)


def test_unknown_names_come_with_the_closest(library: TaskLibrary) -> None:
    (problem,) = library.check(["lmms:mmmu_vall"])
    assert "lmms:mmmu_val" in problem.suggestions
    with pytest.raises(UnknownTask):
        library.load(["lmms:piqa"])


def test_without_lmms_eval_its_names_are_refused(
    data_dir: Path, roots: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "LMMS_EVAL_ROOT", None)
    library = TaskLibrary(data_dir, (), roots, False)
    assert "lmms-eval is not installed" in reason(library, "lmms:mme")
    assert "mme" not in {entry.name for entry in library.entries()}
    assert list(library.load(["arc_easy"])["tasks"]) == ["arc_easy"]


def test_nothing_is_imported_that_is_not_used(data_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gpu_pool.evaluator.catalogue import TaskLibrary\n"
        "library = TaskLibrary(Path(sys.argv[1]), (), {}, False)\n"
        "library.entries(); library.check(['mme', 'lmms:arc_easy'])\n"
        "assert not {'lmms_eval', 'loguru'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(data_dir)], check=True)


def test_a_package_that_is_not_there_has_no_folder() -> None:
    assert package_files.package_folder("no_such_package") is None
    assert package_files.module_file("no_such_package.inner") is None
    assert package_files.module_file("lmms_eval.tasks.mme.utils") is not None
