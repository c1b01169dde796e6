from __future__ import annotations

import pytest

from gpu_pool.evaluator.task_names import TaskNames

NAMES = TaskNames(lm={"mmlu", "piqa", "lm:odd"}, lmms={"mmlu", "mme"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("piqa", ("lm", "piqa")),
        ("mme", ("lmms", "mme")),
        ("mmlu", ("lm", "mmlu")),
        ("lm:mmlu", ("lm", "mmlu")),
        ("lmms:mmlu", ("lmms", "mmlu")),
        ("lmms:mme", ("lmms", "mme")),
        ("lm:odd", ("lm", "lm:odd")),
        ("lm:mme", None),
        ("lmms:piqa", None),
        ("lmms:", None),
        ("other", None),
    ],
)
def test_a_name_means_one_thing(name: str, meant: tuple[str, str] | None) -> None:
    assert NAMES.find(name) == meant


def test_each_task_has_one_full_name_which_means_it() -> None:
    for library, name in (("lm", "mmlu"), ("lmms", "mmlu"), ("lmms", "mme"), ("lm", "piqa")):
        assert NAMES.find(NAMES.full(library, name)) == (library, name)
    assert (NAMES.full("lmms", "mmlu"), NAMES.full("lmms", "mme")) == ("lmms:mmlu", "mme")


def test_names_of_both_libraries_say_so() -> None:
    assert NAMES.note("lm", "mmlu") == "lm-eval's; lmms-eval's task of this name is lmms:mmlu"
    assert NAMES.note("lmms", "mmlu") == "lmms-eval's; mmlu alone is lm-eval's"
    assert NAMES.note("lmms", "mme") is NAMES.note("lm", "piqa") is None
