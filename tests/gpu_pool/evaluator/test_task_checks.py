from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from stock_data import write_stock_data

from gpu_pool.evaluator import hub_data
from gpu_pool.evaluator.catalogue import TaskLibrary

LOCAL = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that lm-eval's own tasks are indexed once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_stock_data(tmp_path_factory.mktemp("stock"))


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", datasets.load_dataset)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    return folder


@pytest.fixture
def library(data_dir: Path, roots: dict[str, str], tasks: Path) -> TaskLibrary:
    return TaskLibrary(data_dir, (str(tasks),), roots, False)


def reason(library: TaskLibrary, *names: str, num_fewshot: int | None = None) -> str:
    (problem,) = library.check(names, num_fewshot)
    assert problem.task == names[-1]
    return problem.reason


def write_local(tasks: Path, name: str, extra: str = "") -> None:
    file = tasks / "rows.jsonl"
    file.write_text('{"goal": "g", "label": "l"}\n')
    (tasks / f"{name}.yaml").write_text(LOCAL.format(name=name, file=file) + extra)


def test_tasks_that_can_run_have_no_problem(library: TaskLibrary) -> None:
    assert library.check(["arc_easy", "piqa", "hellaswag", "mmlu_abstract_algebra", "piqa"]) == ()


def test_unknown_names_come_with_the_closest(library: TaskLibrary) -> None:
    (problem,) = library.check(["piqa", "arc_eazy"])
    assert problem.task == "arc_eazy"
    assert problem.suggestions[0] == "arc_easy"
    assert len(problem.suggestions) <= 5


def test_paths_are_no_names(library: TaskLibrary, tasks: Path) -> None:
    write_local(tasks, "mine")
    assert "there is no task" in reason(library, str(tasks / "mine.yaml"))


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_is_run_only_where_it_is_allowed(
    library: TaskLibrary, data_dir: Path, roots: dict[str, str], name: str
) -> None:
    assert "allow_code_execution" in reason(library, name)
    allowed = TaskLibrary(data_dir, (), roots, True)
    assert "allow_code_execution" not in reason(allowed, name)


def test_code_in_the_users_own_helpers_is_found(library: TaskLibrary, tasks: Path) -> None:
    (tasks / "utils.py").write_text("import evaluate\n\ndef run(docs, preds):\n    evaluate.load('code_eval')\n")
    write_local(tasks, "mine", "process_results: !function utils.run\n")
    assert "allow_code_execution" in reason(library, "mine")


@pytest.mark.parametrize("name", ["gsm8k", "squadv2", "arithmetic_1dc"])
def test_data_that_cannot_be_reached_is_named(library: TaskLibrary, name: str) -> None:
    text = reason(library, name)
    assert "cannot be reached" in text
    if name != "arithmetic_1dc":
        assert "dataset_roots" in text


def test_mapped_paths_must_exist(data_dir: Path, tmp_path: Path) -> None:
    library = TaskLibrary(data_dir, (), {"openai/gsm8k:main": str(tmp_path / "gone")}, False)
    assert f"{tmp_path / 'gone'}, which does not exist" in reason(library, "gsm8k")


def test_the_split_that_is_evaluated_must_be_there(data_dir: Path, roots: dict[str, str]) -> None:
    folder = roots["Rowan/hellaswag"]  # has "validation"; arc_easy evaluates "test"
    library = TaskLibrary(data_dir, (), {"allenai/ai2_arc:ARC-Easy": folder}, False)
    assert "no split 'test'; they have: validation" in reason(library, "arc_easy")


def test_the_fewshot_split_must_be_there_when_it_is_needed(library: TaskLibrary) -> None:
    assert library.check(["piqa"], 0) == ()
    assert "no split 'train'" in reason(library, "piqa", num_fewshot=5)


def test_local_data_files_must_exist(library: TaskLibrary, tasks: Path) -> None:
    write_local(tasks, "mine")
    assert library.check(["mine"]) == ()
    (tasks / "rows.jsonl").unlink()
    assert "rows.jsonl does not exist" in reason(library, "mine")


def test_tasks_with_images_need_a_model_that_reads_them(library: TaskLibrary) -> None:
    assert "the model reads text only" in reason(library, "mmmu_val")


def test_missing_libraries_are_named(library: TaskLibrary, tasks: Path) -> None:
    (tasks / "helpers.py").write_text("import not_installed_either\n")
    (tasks / "utils.py").write_text(
        "import json\nimport helpers\nimport surely_not_installed.sub\n"
        "try:\n    import optional_thing\nexcept ImportError:\n    pass\n"
        "def run(doc):\n    import only_when_called\n"
    )
    write_local(tasks, "mine", "process_docs: !function utils.run\n")
    assert reason(library, "mine").endswith("not_installed_either, surely_not_installed")
    assert "unitxt" in reason(library, "ag_news")


def test_misspelt_keys_and_missing_splits_are_named(library: TaskLibrary, tasks: Path) -> None:
    write_local(tasks, "mine", "num_fewshots: 5\n")
    assert reason(library, "mine").endswith("keys of its YAML: num_fewshots")
    (tasks / "mine.yaml").write_text("task: mine\ndataset_path: baber/piqa\ndoc_to_text: x\n")
    assert "neither a test_split nor a validation_split" in reason(library, "mine")


def test_python_tasks_name_their_data(library: TaskLibrary) -> None:
    assert "tau/scrolls" in reason(library, "scrolls_quality")


def test_groups_name_the_task_that_fails(library: TaskLibrary) -> None:
    text = reason(library, "mmlu_stem")
    assert text.startswith("mmlu_stem cannot run: its task mmlu_")
    assert "abstract_algebra" not in text


def test_group_overrides_count(library: TaskLibrary, tasks: Path) -> None:
    (tasks / "group.yaml").write_text(
        "group: mine\ntask:\n  - task: piqa\n    dataset_path: nobody/elsewhere\n"
        "  - group: inner\n    task: [hellaswag]\n"
    )
    assert "nobody/elsewhere" in reason(library, "mine")


def test_a_task_in_two_requested_groups_is_explained(library: TaskLibrary, tasks: Path) -> None:
    (tasks / "one.yaml").write_text("group: one\ntask: [piqa, hellaswag]")
    (tasks / "two.yaml").write_text("group: two\ntask: [arc_easy, piqa]")
    assert "contains the task piqa, which one contains too" in reason(library, "one", "two")
    assert "which one contains too" in reason(library, "one", "piqa")
    with pytest.raises(ValueError, match="Duplicate task 'piqa'"):
        library.load(["one", "two"])  # lm-eval's own answer


def test_a_group_that_contains_itself_is_refused(library: TaskLibrary, tasks: Path) -> None:
    (tasks / "one.yaml").write_text("group: one\ntask: [two]")
    (tasks / "two.yaml").write_text("group: two\ntask: [one]")
    assert "contains itself" in reason(library, "one")


def test_an_answer_of_the_hub_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a hub that refuses connections: the second question must not be asked."""
    monkeypatch.setattr(hub_data.datasets.config, "HF_HUB_OFFLINE", False)
    hub = hub_data.HubData()
    first = hub.problem("nobody/has-this", None, ())
    assert first is not None
    assert "dataset_roots" in first
    monkeypatch.setattr(hub_data.huggingface_hub, "HfApi", None)
    assert hub.problem("nobody/has-this", None, ()) == first
    assert "nobody/has-that" in (hub.problem("nobody/has-that", None, ()) or "")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("{temperature: hot}", "generation_kwargs.temperature must be a number, 0 or more, not 'hot'"),
        ("{top_p: 2}", "generation_kwargs.top_p must be a number above 0, at most 1, not 2"),
        ("{max_gen_toks: 0}", "generation_kwargs.max_gen_toks must be 1 or more, not 0"),
        ("{max_gen_toks: many}", "generation_kwargs.max_gen_toks must be 1 or more, not many"),
        ("{until: 5}", "generation_kwargs.until must be a string or a list of strings, not 5"),
        ("{temprature: 0.5}", "generation_kwargs.temprature is unknown; close names: temperature"),
        ("{num_return_sequences: 2}", "generation_kwargs.num_return_sequences must be 1, not 2"),
        ("[0.5]", "generation_kwargs must be a mapping of options, not [0.5]"),
    ],
)
def test_bad_generation_options_name_their_task_and_key(
    options: str, problem: str, library: TaskLibrary, tasks: Path
) -> None:
    write_local(tasks, "told", f"output_type: generate_until\ngeneration_kwargs: {options}\n")
    assert reason(library, "told").startswith(f"told cannot run: {problem}")


def test_options_that_lm_eval_reads_are_taken(library: TaskLibrary, tasks: Path) -> None:
    options = '{max_gen_toks: "64", do_sample: 1, temperature: 0.5, until: null, max_length: 900, use_cache: false}'
    write_local(tasks, "told", f"output_type: generate_until\ngeneration_kwargs: {options}\n")
    assert library.check(["told"]) == ()
