"""What is found out about a checkpoint when it is loaded, and the forms that one may have."""

import shutil
from pathlib import Path

import pytest
from checkpoint_forms import save_gguf
from fresh_models import change_json, load_fresh
from lm_eval_answers import values


@pytest.mark.parametrize("stated", [{}, {"max_position_embeddings": 77}])
def test_length_as_lm_eval_derives_it(stated, copied, reference):
    change_json(copied / "config.json", **stated)
    assert load_fresh(copied).max_length == reference(copied).max_length


@pytest.mark.parametrize("model_max_length", [None, 99])
def test_length_of_a_model_that_states_none(model_max_length, checkpoint, tmp_path, reference):
    folder = Path(shutil.copytree(checkpoint("mamba"), tmp_path / "model"))
    change_json(folder / "tokenizer_config.json", model_max_length=model_max_length)
    assert load_fresh(folder).max_length == reference(folder).max_length == (model_max_length or 2048)


@pytest.mark.parametrize("args", [{}, {"prefix_token_id": 9}])
def test_prefix_token(args, copied, reference):
    assert load_fresh(copied, **args).prefix_token_id == reference(copied, **args).prefix_token_id


def test_prefix_token_without_bos_is_eos(copied, reference):
    change_json(copied / "tokenizer_config.json", bos_token=None)
    assert load_fresh(copied).prefix_token_id == reference(copied).prefix_token_id == 2


def test_pad_token_is_found(copied):
    change_json(copied / "tokenizer_config.json", pad_token=None)
    assert load_fresh(copied).tokenizer.pad_token_id == 0  # the unknown token's, as lm-eval chooses


def test_subfolder(checkpoint, tmp_path, load):
    shutil.copytree(checkpoint("llama"), tmp_path / "inner")
    assert values(load_fresh(tmp_path, subfolder="inner")) == values(load(checkpoint("llama")))


def test_tokenizer_of_another_folder(copied, tiny_model):
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert load_fresh(copied, tokenizer=str(tiny_model)).tokenizer.name_or_path == str(tiny_model)


@pytest.mark.parametrize("split", [True, False])
def test_gguf(split, checkpoint, tmp_path, load):
    save_gguf(tmp_path / "tiny.gguf", checkpoint("llama"))
    loaded = load_fresh(tmp_path, gguf_file="tiny.gguf") if split else load_fresh(tmp_path / "tiny.gguf")
    assert values(loaded) == pytest.approx(values(load(checkpoint("llama"))), rel=1e-5)
    text = "which of these is it?"
    assert loaded.tokenizer.encode(text) == load(checkpoint("llama")).tokenizer.encode(text)


REMOTE_MODULE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_only_when_asked_for_and_allowed(copied):
    (copied / "own.py").write_text(REMOTE_MODULE)
    change_json(
        copied / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    for asked, allowed in ((False, True), (True, False)):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_fresh(copied, trust_remote_code=asked, allow_remote_code=allowed)
    loaded = load_fresh(copied, trust_remote_code=True, allow_remote_code=True)
    assert type(loaded.model).__name__ == "OwnModel"
