"""Models that read images in the running service: a real one that reads digits, on digits that it has not seen."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from digits import ACCURACY, MODEL, write_digits
from evalpool_server import run_server
from service import Service

CHAT = {"apply_chat_template": True, "model_args": {"dtype": "float32"}}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """Two CPU workers."""
    folder = tmp_path_factory.mktemp("box")
    tasks = write_digits(folder / "tasks")
    arguments = ("--include-path", tasks, "--cpu-workers", 2)
    with run_server(folder / "data", *arguments) as server, Service(server) as service:
        yield service


@pytest.mark.parametrize(("batch_size", "num_gpus"), [(1, 1), (8, 2), ("auto", 2)])
def test_the_model_scores_what_it_scores(box: Service, batch_size: int | str, num_gpus: int) -> None:
    job = box.finished(box.submit(MODEL, "digits", "digits_choice", batch_size=batch_size, num_gpus=num_gpus, **CHAT))
    assert job["metrics"]["digits"]["exact_match,digit"] == pytest.approx(ACCURACY, abs=1e-4)
    assert job["metrics"]["digits_choice"]["acc,none"] == pytest.approx(ACCURACY, abs=1e-4)
