"""POST /merge: the reference's shape and statuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


async def test_a_checkpoint_that_is_not_there(api: Any):
    response = await api.post("/merge", json={"checkpoint_path": "/nope", "output_path": None})
    assert (response.status_code, response.json()["detail"]) == (404, "Checkpoint /nope not found")


async def test_a_folder_without_shards(api: Any, tmp_path: Path):
    response = await api.post("/merge", json={"checkpoint_path": str(tmp_path), "checkpoint_type": "ema"})
    assert response.status_code == 400
    assert "pytorch_ema_model_fsdp_0" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "checkpoint_path"),
        ({"checkpoint_path": ""}, "checkpoint_path"),
        ({"checkpoint_path": "/nope", "checkpoint_type": "best"}, "checkpoint_type"),
        ({"checkpoint_path": "/nope", "output": "/x"}, "output"),
    ],
)
async def test_refusals(api: Any, body: dict[str, Any], field: str):
    response = await api.post("/merge", json=body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field
