"""lmms-eval's tasks through the whole service."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from digits import MODEL
from evalpool_server import run_server
from lmms_data import DOCUMENTS, write_lmms_data
from service import PATIENCE_SECONDS, Service

from server.client import EvalError

pytest.importorskip("lmms_eval")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """One CPU worker, and local data of some of lmms-eval's tasks."""
    folder = tmp_path_factory.mktemp("box")
    roots = "".join(f'"{name}" = "{path}"\n' for name, path in write_lmms_data(folder / "roots").items())
    (folder / "evalpool.toml").write_text(f"[dataset_roots]\n{roots}")
    arguments = ("--config", folder / "evalpool.toml", "--cpu-workers", 1)
    with run_server(folder / "data", *arguments) as server, Service(server) as service:
        yield service


def test_tasks_of_both_libraries_in_one_job(box: Service) -> None:
    names = ["mme", "lmms:arc_easy", "arc_easy"]
    job = box.finished(box.submit(MODEL, *names, model_args={"dtype": "float32"}))
    assert set(job["metrics"]) == set(names)
    assert job["metrics"]["mme"]["mme_perception_score,none"] > 0
    assert job["metrics"]["lmms:arc_easy"]["acc,none"] == job["metrics"]["arc_easy"]["acc,none"]
    assert len(list(box.client.samples(job["job_id"], "lmms:arc_easy"))) == DOCUMENTS


def test_the_list_of_tasks_says_what_each_is(box: Service) -> None:
    listed = httpx.get(f"{box.server.url}/tasks", params={"details": True}, timeout=PATIENCE_SECONDS).json()
    entries = {entry["name"]: entry for entry in listed["entries"]}
    assert entries["mme"] == {
        "name": "mme",
        "kind": "task",
        "library": "lmms-eval",
        "output_type": "generate_until",
        "modality": "image",
        "documents": DOCUMENTS,
        "note": None,
    }
    assert entries["lmms:mmmu_val"]["note"] == "lmms-eval's; mmmu_val alone is lm-eval's"


def test_a_text_model_is_refused_what_shows_images(box: Service, tiny_model: Path) -> None:
    with pytest.raises(EvalError, match="the model reads text only"):
        box.submit(tiny_model, "mme")
