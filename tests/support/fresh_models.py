"""Models that a test loads for itself, and files of checkpoints that it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loading import load_model


def load_fresh(folder: Path, device: Any = "cpu", *, allow_remote_code: bool = False, **args: Any) -> LoadedModel:
    """The engine's model of this checkpoint, in the checkpoint's own type unless `args` say otherwise."""
    spec = ModelSpec(kind="hf", args=ModelArgs(pretrained=str(folder), **args), fingerprint="", device=device)
    return load_model(spec, allow_remote_code=allow_remote_code)


def change_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
