"""GET /cache and POST /cache/prune over a real cache file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gpu_pool.cache import CachedModel, ResponseCache, cache_path


async def test_statistics_and_pruning(api: Any, tmp_path: Path):
    assert (await api.get("/cache")).json()["entries"] == 0
    with closing(ResponseCache(cache_path(tmp_path))) as cache:
        cache.store({b"a": "text"}, CachedModel("ab" * 32, "/models/one"))
        cache.store({b"b": "text"}, CachedModel("cd" * 32, "/models/two"))
    found = (await api.get("/cache")).json()
    assert found["entries"] == 2
    assert {model["name"] for model in found["models"]} == {"/models/one", "/models/two"}
    assert (await api.post("/cache/prune", json={})).json()["deleted_entries"] == 0
    assert (await api.post("/cache/prune", json={"model": "abababab"})).json()["deleted_entries"] == 1
    assert (await api.post("/cache/prune", json={"older_than_days": 0})).json()["deleted_entries"] == 1
    assert (await api.get("/cache")).json()["models"] == []


@pytest.mark.parametrize(
    ("body", "field"), [({"model": "/models/none"}, "model"), ({"older_than_days": -1}, "older_than_days")]
)
async def test_refusals(api: Any, body: dict[str, Any], field: str):
    response = await api.post("/cache/prune", json=body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["field"] == field
