from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks._factory import TaskFactory
from stock_data import write_stock_data

from gpu_pool.evaluator import task_index
from gpu_pool.evaluator.catalogue import TaskLibrary, UnknownTask
from gpu_pool.evaluator.dataset_roots import MissingSplit

MINE = """
task: mine
tag: my_tag
dataset_path: baber/piqa
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{goal}}"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
"""
STOCK = ["arc_easy", "piqa", "hellaswag", "mmlu_abstract_algebra"]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that lm-eval's own tasks are indexed once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_stock_data(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def library(data_dir: Path, roots: dict[str, str]) -> TaskLibrary:
    return TaskLibrary(data_dir, (), roots, False)


def names(library: TaskLibrary) -> dict[str, str]:
    return {entry.name: entry.kind for entry in library.entries()}


def test_entries_name_tasks_groups_and_tags(library: TaskLibrary) -> None:
    entries = library.entries()
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    kinds = names(library)
    assert (kinds["arc_easy"], kinds["mmlu"], kinds["ai2_arc"]) == ("task", "group", "tag")
    assert next(entry.output_type for entry in entries if entry.name == "piqa") == "multiple_choice"
    assert len(entries) > 10_000


def test_the_index_is_read_from_disk(data_dir: Path, library: TaskLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(task_index, "_build", build)
    assert names(TaskLibrary(data_dir, (), {}, False)) == names(library)


@pytest.mark.slow
def test_the_index_is_lm_evals(library: TaskLibrary) -> None:
    from lm_eval.tasks import TaskManager

    theirs, ours = TaskManager().task_index, library._manager.task_index
    assert {name: (e.kind, e.yaml_path, e.tags) for name, e in theirs.items()} == {
        name: (e.kind, e.yaml_path, e.tags) for name, e in ours.items()
    }


def test_a_damaged_index_is_built_again(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "mine.yaml").write_text(MINE)
    first = task_index.load_index(folder, tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(b"junk")
    assert task_index.load_index(folder, tmp_path / "cache") == first


def test_an_index_that_cannot_be_kept_is_an_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(MINE)
    (tmp_path / "file").touch()
    kept = task_index.load_index(tmp_path / "tasks", tmp_path / "cache")
    assert task_index.load_index(tmp_path / "tasks", tmp_path / "file" / "cache") == kept
    assert "cannot be written" in caplog.text


def test_include_paths_win_and_follow_changes(data_dir: Path, tmp_path: Path, roots: dict[str, str]) -> None:
    library = TaskLibrary(data_dir, (str(tmp_path),), roots, False)
    assert "mine" not in names(library)
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "piqa.yaml").write_text(MINE.replace("task: mine", "task: piqa").replace("{{goal}}", "mine: {{goal}}"))
    assert (names(library)["mine"], names(library)["my_tag"]) == ("task", "tag")
    task = library.load(["piqa"])["tasks"]["piqa"]
    assert task.doc_to_text(task.eval_docs[0]) == "mine: do 0"
    (tmp_path / "mine.yaml").unlink()
    assert "mine" not in names(library)


def test_broken_yaml_leaves_the_others(data_dir: Path, tmp_path: Path, roots: dict[str, str]) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "broken.yaml").write_text("task: [unclosed")
    (tmp_path / "lonely.yaml").write_text("include: not_there.yaml\ntask: lonely")
    (tmp_path / "template.yaml").write_text("num_fewshot: 5")
    library = TaskLibrary(data_dir, (str(tmp_path),), roots, False)
    assert "mine" in names(library)
    (problem,) = library.check(["lonely"])
    assert "lonely.yaml cannot be read: FileNotFoundError" in problem.reason
    assert "template.yaml" not in problem.reason


def test_a_missing_include_path_is_no_error(data_dir: Path, tmp_path: Path) -> None:
    assert "piqa" in names(TaskLibrary(data_dir, (str(tmp_path / "nowhere"),), {}, False))


def test_stock_tasks_load_from_local_files(library: TaskLibrary) -> None:
    loaded = library.load([*STOCK, "piqa"])
    assert list(loaded["tasks"]) == STOCK
    assert {name: len(task.eval_docs) for name, task in loaded["tasks"].items()} == dict.fromkeys(STOCK, 6)
    again = library.load(STOCK)["tasks"]
    assert again["hellaswag"] is not loaded["tasks"]["hellaswag"]
    assert again["hellaswag"].eval_docs is loaded["tasks"]["hellaswag"].eval_docs, "processed once"


def test_tags_and_groups_load(data_dir: Path, tmp_path: Path, roots: dict[str, str]) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "group.yaml").write_text("group: my_group\ntask: [piqa, my_tag]")
    library = TaskLibrary(data_dir, (str(tmp_path),), roots, False)
    assert list(library.load(["my_tag"])["tasks"]) == ["mine"]
    loaded = library.load(["my_group"])
    assert (list(loaded["tasks"]), list(loaded["groups"])) == (["piqa", "mine"], ["my_group"])


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("name", ["arc_easy", "mmlu_abstract_algebra"])
def test_prompts_are_those_of_lm_eval(library: TaskLibrary, name: str, shots: int) -> None:
    stock = TaskFactory().build(library._manager.task_index[name], registry=library._manager.task_index)
    prompts = []
    for task in (stock, library.load([name])["tasks"][name]):
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=4)
        prompts.append([instance.args for instance in task.instances])
    assert prompts[0] == prompts[1]


def test_results_show_the_same_configuration(library: TaskLibrary) -> None:
    stock = TaskFactory().build(library._manager.task_index["mmlu_abstract_algebra"], registry={})
    ours = library.load(["mmlu_abstract_algebra"])["tasks"]["mmlu_abstract_algebra"]
    assert ours.dump_config() == stock.dump_config()
    hellaswag = library.load(["hellaswag"])["tasks"]["hellaswag"]
    assert "def _process_doc(doc)" in hellaswag.dump_config()["process_docs"]


def test_a_missing_split_matters_only_when_it_is_needed(library: TaskLibrary) -> None:
    task = library.load(["piqa"])["tasks"]["piqa"]  # its training split is not among the files
    task.set_fewshot_seed(1234)
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=2)
    task.set_config("num_fewshot", 2)
    with pytest.raises(MissingSplit, match="no split 'train'"):
        task.build_all_requests(limit=2)


def test_another_split_is_never_evaluated_instead(data_dir: Path, tmp_path: Path, roots: dict[str, str]) -> None:
    shutil.copytree(Path(roots["allenai/ai2_arc"]) / "ARC-Easy", tmp_path / "ARC-Easy")
    (tmp_path / "ARC-Easy" / "test.parquet").rename(tmp_path / "ARC-Easy" / "validation.parquet")
    library = TaskLibrary(data_dir, (), {"allenai/ai2_arc": str(tmp_path)}, False)
    with pytest.raises(MissingSplit, match="no split 'test'; they have: train, validation"):
        library.load(["arc_easy"])


def test_a_path_is_no_task(library: TaskLibrary, tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(MINE)
    with pytest.raises(UnknownTask):
        library.load([str(tmp_path / "evil.yaml")])


def test_the_library_s_index_is_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert task_index.library_cache(tmp_path / "data") == tmp_path / "home" / "evalpool"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert task_index.library_cache(tmp_path / "data") == tmp_path / "data"
