"""What is expected of a checkpoint before it is loaded, against what its parameters take once it is."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PLAIN, TREE
from checkpoint_forms import save_adapter, save_gguf
from fresh_models import change_json, load_fresh
from transformers import AutoModelForCausalLM

from gpu_pool.model_size import GIVEN_OUT, ReplicaSize, activation_bytes, replica_size
from gpu_pool.records import ModelArgs
from gpu_pool.worker.engine.limits import _SHARES
from gpu_pool.worker.engine.loading import split_gguf

Checkpoint = Callable[..., Path]

ENCODER_DECODERS = ("t5", "mt5", "switch_transformers", "bart", "m2m_100")
IN_HALVES = {"llama": 0.0, "t5": 0.0, "mt5": 0.0, "gpt_oss": 0.003, "rwkv": 0.003, "deepseek_v3": 0.001}
"""Architectures to load in float16, of which transformers keeps some parts in fp32: vectors are too few to count."""


def held(model: Any) -> int:
    """Bytes of the parameters, and of buffers that are saved with them; those that share their memory once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def expected(folder: Path, **args: Any) -> ReplicaSize:
    size = replica_size(split_gguf(ModelArgs(pretrained=str(folder), **args)), "cpu")
    assert size is not None
    return size


@pytest.mark.parametrize("name", sorted({*TREE, *PLAIN, *ENCODER_DECODERS}))
def test_every_architecture(name: str, checkpoint: Checkpoint) -> None:
    size = expected(checkpoint(name))
    assert size.weights_bytes == held(load_fresh(checkpoint(name)).model)
    assert 0 < size.replicated_bytes < size.weights_bytes
    assert not size.estimated


@pytest.mark.parametrize("name", sorted(TREE.keys() - {"gpt_neox", "opt"}))  # these two share no heads, whatever is set
def test_room_for_keys_and_values(name: str, checkpoint: Checkpoint) -> None:
    """What is kept of a token takes what is left free for it."""
    longer, shorter = (expected(checkpoint(name), max_length=length).room_bytes for length in (200_000, 100_000))
    left_free = (longer - shorter) * GIVEN_OUT / 100_000
    assert load_fresh(checkpoint(name)).token_bytes == pytest.approx(left_free, rel=1e-3)


@pytest.mark.parametrize(("name", "tolerance"), IN_HALVES.items())
def test_halves(name: str, tolerance: float, checkpoint: Checkpoint) -> None:
    loaded = load_fresh(checkpoint(name), dtype="float16")
    assert expected(checkpoint(name), dtype="float16").weights_bytes == pytest.approx(held(loaded.model), rel=tolerance)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float64"])
def test_types(stored: str, asked: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=getattr(torch, stored)).save_pretrained(tmp_path)
    copy_tokenizer(checkpoint("llama"), tmp_path)
    found = {expected(tmp_path, dtype=asked).weights_bytes}
    change_json(tmp_path / "config.json", dtype=None)  # then "auto" goes by the weights
    found.add(expected(tmp_path, dtype=asked).weights_bytes)
    assert found == {held(load_fresh(tmp_path, dtype=asked).model)}


def test_many_shards_in_a_subfolder(checkpoint: Checkpoint, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    AutoModelForCausalLM.from_pretrained(checkpoint("llama")).save_pretrained(inner, max_shard_size="30KB")
    copy_tokenizer(checkpoint("llama"), inner)
    assert len(list(inner.glob("model-*.safetensors"))) > 3
    assert expected(tmp_path, subfolder="inner") == expected(checkpoint("llama"))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_count_once(tied: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Also where the file holds both, as those of some trainers do."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", tie_word_embeddings=tied)
    assert expected(folder).weights_bytes == held(load_fresh(folder).model)


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_pickled_weights_are_estimated_by_their_files(asked: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    change_json(folder / "config.json", dtype="bfloat16")
    size = expected(folder, dtype=asked)
    assert size.estimated
    assert size.weights_bytes == pytest.approx(held(load_fresh(folder, dtype=asked).model), rel=0.2)  # a tiny file


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_added(dtype: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    from peft import LoraConfig, TaskType

    settings = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"])
    save_adapter(tmp_path, checkpoint("llama"), settings)
    size = expected(checkpoint("llama"), dtype=dtype, peft=str(tmp_path))
    assert size.weights_bytes == held(load_fresh(checkpoint("llama"), dtype=dtype, peft=str(tmp_path)).model)
    assert size.weights_bytes > expected(checkpoint("llama"), dtype=dtype).weights_bytes
    assert size.heads == ()  # it is not sharded


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_gguf(dtype: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", checkpoint("llama"))
    size = expected(tmp_path / "tiny.gguf", dtype=dtype)
    assert size.weights_bytes == held(load_fresh(tmp_path / "tiny.gguf", dtype=dtype).model)
    as_safetensors = expected(checkpoint("llama"), dtype="float32" if dtype == "auto" else dtype)
    assert (size.room_bytes, size.weights_bytes) == (as_safetensors.room_bytes, as_safetensors.weights_bytes)
    assert size.replicated_bytes == as_safetensors.replicated_bytes


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
@pytest.mark.parametrize(
    "how", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}]
)
def test_bitsandbytes(name: str, how: dict[str, Any], checkpoint: Checkpoint) -> None:
    pytest.importorskip("bitsandbytes", reason="an optional package: pip install 'evalpool[quantization]'")
    loaded = load_fresh(checkpoint(name), dtype="bfloat16", **how).model
    tensors = [*loaded.parameters()]
    tensors += itertools.chain.from_iterable(scales(part) for part in (*loaded.parameters(), *loaded.modules()))
    there = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    assert expected(checkpoint(name), dtype="bfloat16", **how).weights_bytes == pytest.approx(there, rel=0.01)


def scales(part: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a quantised parameter, or in its layer once that has computed something."""
    state = getattr(part, "quant_state", None) or getattr(part, "state", None)
    nested = getattr(state, "state2", None)
    found = [getattr(state, "absmax", None), getattr(nested, "absmax", None)]
    found += [getattr(state, "SCB", None), getattr(part, "SCB", None)]
    return [scale for scale in found if isinstance(scale, torch.Tensor)]


def test_the_room_is_what_the_limits_plan_with() -> None:
    assert sum(_SHARES.values()) == pytest.approx(GIVEN_OUT)


def test_activations_of_a_token(checkpoint: Checkpoint) -> None:
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    assert activation_bytes(hidden, inner, 1, 2) == 2 * (8 * 32 + 3 * 64) * 4 == activation_bytes(hidden, inner, 1, 4)


def test_widths_of_layers_count_as_the_widest(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    wide = expected(checkpoint("llama")).room_bytes
    change_json(folder / "config.json", intermediate_size=[16, 64])
    assert expected(folder).room_bytes == wide
    change_json(folder / "config.json", intermediate_size=[16, 32])
    assert expected(folder).room_bytes < wide


def test_an_absurd_number_of_layers_is_a_size_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """To be told at once, whatever a configuration says: nobody can hold such a model."""
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    change_json(folder / "config.json", num_hidden_layers=10**30)
    assert expected(folder).room_bytes > 10**30


def copy_tokenizer(source: Path, target: Path) -> None:
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)
