"""Models that a test loads for itself, and files of checkpoints that it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loading import load_model, wrap_model


def load_fresh(folder: Path, device: Any = "cpu", *, allow_remote_code: bool = False, **args: Any) -> LoadedModel:
    """The engine's model of this checkpoint, in the checkpoint's own type unless `args` say otherwise."""
    spec = ModelSpec(kind="hf", args=ModelArgs(pretrained=str(folder), **args), fingerprint="", device=device)
    return load_model(spec, allow_remote_code=allow_remote_code)


def random_model(
    tokenizer_folder: Path, settings: dict[str, Any], dtype: Any = None, seed: int = 0, max_length: int = 256
) -> LoadedModel:
    """The engine's model of a config with these fields, with random weights that are in no file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(vocab_size=len(tokenizer), **ids, **settings)
    model = AutoModelForCausalLM.from_config(config).to(dtype or torch.float32).eval()
    return wrap_model(model, tokenizer, ModelArgs(pretrained="", max_length=max_length))


def change_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
