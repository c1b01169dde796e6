"""Servers under fire, one for each way of killing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from chaos_box import Box

OpenBox = Callable[..., Box]


@pytest.fixture(scope="module")
def open_box(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Generator[OpenBox]:
    """`open_box(workers=2)`: a Box on a fresh folder; its server ends with the tests of the file."""
    with ExitStack() as boxes:

        def open_one(**fields: Any) -> Box:
            return boxes.enter_context(Box(tmp_path_factory.mktemp("box"), tiny_model, **fields))

        yield open_one
