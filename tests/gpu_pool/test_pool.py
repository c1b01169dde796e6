"""The pool before any process is started; with processes it is tested as a service (tests/test_service*.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_pool.errors import PoolError
from gpu_pool.pool import Pool
from gpu_pool.settings import PoolSettings


async def test_a_folder_of_tasks_must_exist(tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path / "data", include_paths=(tmp_path, tmp_path / "nope"))
    with pytest.raises(PoolError, match=r"include_paths: there is no such folder: .*/nope$"):
        await Pool(settings).start()
