"""A family's name alone, through the whole service: its default checkpoint comes from the hub's cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from evalpool_server import run_server
from fake_openai import FakeOpenAI, openai_server
from lmms_data import DOCUMENTS, write_lmms_data
from service import Service

from server.client import EvalError

pytest.importorskip("lmms_eval")
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def chat() -> Generator[FakeOpenAI]:
    with openai_server(chat=lambda body: "Yes.") as server:
        yield server


@pytest.fixture(scope="module")
def box(
    tiny_vlm: Callable[[str], Path], chat: FakeOpenAI, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Service]:
    """One CPU worker, the data of MME, an endpoint, and a hub's cache with a tiny checkpoint in LLaVA's place."""
    folder = tmp_path_factory.mktemp("box")
    repo = folder / "hub" / "models--llava-hf--llava-1.5-7b-hf"
    shutil.copytree(tiny_vlm("llava"), repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    roots = "".join(f'"{name}" = "{path}"\n' for name, path in write_lmms_data(folder / "roots").items())
    endpoint = f'[endpoints.talk]\nbase_url = "{chat.url}"\nmodel = "gpt-test"\n'
    (folder / "evalpool.toml").write_text(f"[dataset_roots]\n{roots}{endpoint}")
    arguments = ("--config", folder / "evalpool.toml", "--cpu-workers", 1)
    variables = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    with run_server(folder / "data", *arguments, variables=variables) as server, Service(server) as service:
        yield service


def test_llava_on_mme(box: Service) -> None:
    job = box.finished(box.client.evaluate("llava", ["mme"], device="cpu")["job_id"])
    assert job["model"]["args"]["pretrained"] == "llava-hf/llava-1.5-7b-hf"
    assert job["model"]["args"]["revision"] == COMMIT
    assert job["metrics"]["mme"]["mme_perception_score,none"] >= 0
    assert job["metrics"]["mme"].get("evalpool_errored", 0) == 0
    assert len(list(box.client.samples(job["job_id"], "mme"))) == DOCUMENTS


def test_a_chat_endpoint_on_mme(box: Service, chat: FakeOpenAI) -> None:
    job = box.finished(box.client.evaluate("openai", ["mme"], num_gpus=0)["job_id"])
    yes = sum(sample["doc"]["answer"] == "Yes" for sample in box.client.samples(job["job_id"], "mme"))
    assert 0 < yes < DOCUMENTS
    assert job["metrics"]["mme"]["mme_perception_score,none"] > 0
    assert len(chat.bodies) == DOCUMENTS
    for body in chat.bodies:
        [turn] = body["messages"]
        assert [part["type"] for part in turn["content"]] == ["image_url", "text"]
        assert "Answer the question using a single word or phrase." in turn["content"][1]["text"]


def test_a_checkpoint_that_cannot_be_had_is_named(box: Service) -> None:
    with pytest.raises(EvalError, match=r"Qwen/Qwen2\.5-VL-3B-Instruct is no path on the server, and the hub cannot"):
        box.client.evaluate("qwen2_5_vl", ["mme"], device="cpu")
