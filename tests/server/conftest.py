"""The REST face over a pool that runs nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_pool import FakePool
from litestar.testing import AsyncTestClient

from server.app import create_app
from server.settings import Settings

MAX_BODY_BYTES = 10_000


@pytest.fixture
def fake_pool(tmp_path: Path) -> FakePool:
    return FakePool(tmp_path)


@pytest.fixture
async def api(fake_pool: FakePool) -> AsyncIterator[AsyncTestClient[Any]]:
    """A client of the application, whose lifespan has started the pool."""
    async with AsyncTestClient(create_app(Settings(max_body_bytes=MAX_BODY_BYTES), fake_pool)) as client:
        yield client
