from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpu_pool import checkpoints
from gpu_pool.checkpoints import ENCODER_DECODER_TYPES, IMAGE_TEXT_TYPES, check_config
from gpu_pool.errors import InvalidRequest
from gpu_pool.model_names import MODEL_NAMES
from gpu_pool.models import modalities, model_kinds, resolve_hub_revision, resolve_model
from gpu_pool.records import ModelArgs

NEW_IMAGE_TEXT = {"model_type": "of_tomorrow", "vision_config": {}, "architectures": ["XForConditionalGeneration"]}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def write_checkpoint(folder: Path, config: dict[str, Any] = LLAMA) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def resolve(model: str, model_args: dict[str, Any] | None = None, *, allow_remote_code: bool = False) -> ModelArgs:
    return resolve_model(model, model_args or {}, allow_remote_code=allow_remote_code)


def refused(model: str, model_args: dict[str, Any] | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        resolve(model, model_args)
    return caught.value


@pytest.mark.parametrize("kind", ["hf", "huggingface", "transformers", "qwen2_5_vl", "llava_hf"])
def test_a_kind_takes_pretrained(checkpoint: Path, kind: str) -> None:
    assert kind in model_kinds()
    args = resolve(kind, {"pretrained": str(checkpoint), "dtype": "half", "max_length": 128})
    defaults = MODEL_NAMES[kind].defaults
    assert args == ModelArgs(pretrained=str(checkpoint), dtype="float16", max_length=128, **defaults)


def test_a_path_or_hub_id_is_a_model_itself(checkpoint: Path) -> None:
    assert resolve(str(checkpoint)).pretrained == str(checkpoint)
    assert resolve(str(checkpoint), {"pretrained": str(checkpoint)}).pretrained == str(checkpoint)
    assert resolve("org/name", {"revision": "v1"}) == ModelArgs(pretrained="org/name", revision="v1")
    assert resolve("hf", {"pretrained": "gpt2"}).pretrained == "gpt2"
    assert refused(str(checkpoint), {"pretrained": "other/model"}).field == "model_args.pretrained"


def test_a_gguf_path_is_its_folder_and_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF....")
    (tmp_path / "zip.gguf").write_bytes(b"PK......")
    expected = ModelArgs(pretrained=str(tmp_path), gguf_file="m.gguf")
    assert resolve(str(tmp_path / "m.gguf")) == expected
    assert resolve(str(tmp_path), {"gguf_file": "m.gguf"}) == expected
    assert refused(str(tmp_path), {"gguf_file": "n.gguf"}).field == "model_args.gguf_file"
    assert "not a GGUF file" in refused(str(tmp_path / "zip.gguf")).problem
    assert "m.gguf" in refused(str(tmp_path)).problem


@pytest.mark.parametrize("model", ["hff", "", "no such model", "/no/such/path", "./nothing", "a/b/c", "x" * 5000, "\0"])
def test_unknown_models_are_refused(model: str) -> None:
    assert refused(model).field == "model"


def test_a_misspelt_kind_comes_with_the_closest() -> None:
    assert "qwen2_5_vl" in refused("qwen25_vl").choices


@pytest.mark.parametrize("pretrained", [None, "", "/no/such/path", "a b", "\0"])
def test_a_kind_without_a_model_is_refused(pretrained: str | None) -> None:
    assert refused("hf", {"pretrained": pretrained}).field == "model_args.pretrained"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_length", "128"),
        ("max_length", True),
        ("max_length", 0),
        ("dtype", "float17"),
        ("dtype", 16),
        ("softmax_dtype", "auto32"),
        ("attn_implementation", "flash"),
        ("attn_implementation", "someone/kernel"),
        ("truncation", "true"),
        ("prefix_token_id", -1),
        ("chat_template_args", []),
        ("trust_remote_code", True),
        ("load_in_8bit", "true"),
        ("bnb_4bit_quant_type", "nf4"),
        ("backend", "causal"),
        ("peft", "/no/such/adapter"),
        ("tokenizer", "/no/such/tokenizer"),
        ("subfolder", "nowhere"),
        ("gguf_file", "none.gguf"),
        ("batch_size", 4),
        ("device", "cpu"),
        ("max_pixels", 0),
        ("image_size", 224),
        ("pretrained", 5),
    ],
)
def test_wrong_arguments_name_their_key(checkpoint: Path, key: str, value: object) -> None:
    error = refused("hf", {"pretrained": str(checkpoint), key: value})
    assert error.field == f"model_args.{key}"


def test_unknown_arguments_come_with_the_known_ones(checkpoint: Path) -> None:
    error = refused(str(checkpoint), {"dtyp": "float32"})
    assert error.field == "model_args.dtyp"
    assert error.choices[0] == "dtype"
    assert "attn_implementation" in error.problem


def test_arguments_with_a_field_of_their_own_point_there(checkpoint: Path) -> None:
    assert "`batch_size` beside" in refused(str(checkpoint), {"batch_size": 4}).problem


def test_known_values_are_accepted(checkpoint: Path) -> None:
    for attention in ("eager", "sdpa", "flex_attention"):
        assert resolve(str(checkpoint), {"attn_implementation": attention}).attn_implementation == attention
    assert resolve(str(checkpoint), {"trust_remote_code": True}, allow_remote_code=True).trust_remote_code


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn"])
def test_attention_that_needs_a_package(checkpoint: Path, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_pool.models.find_spec", lambda name: None)
    assert "not installed" in refused(str(checkpoint), {"attn_implementation": attention}).problem
    monkeypatch.setattr("gpu_pool.models.find_spec", lambda name: object())
    assert resolve(str(checkpoint), {"attn_implementation": attention}).attn_implementation == attention


def test_quantised_weights_need_their_package(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"quant_method": "gptq", "bits": 4}
    quantised = str(write_checkpoint(tmp_path / "quantised", {**LLAMA, "quantization_config": method}))
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "half"}
    monkeypatch.setattr("gpu_pool.quantization.find_spec", lambda name: None)
    assert "(optimum, gptqmodel)" in refused(quantised).problem
    assert "(bitsandbytes)" in refused(str(checkpoint), four).problem
    monkeypatch.setattr("gpu_pool.quantization.find_spec", lambda name: object())
    assert resolve(quantised).pretrained == quantised
    assert refused(quantised, four).field == "model_args.load_in_4bit"
    expected = ModelArgs(pretrained=str(checkpoint), load_in_4bit=True, bnb_4bit_compute_dtype="float16")
    assert resolve(str(checkpoint), four) == expected


def test_an_encoder_decoder_is_accepted(tiny_t5: Path) -> None:
    assert resolve(str(tiny_t5)).pretrained == str(tiny_t5)


def test_an_adapter_is_no_model_and_a_model_no_adapter(checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "as `peft`" in refused(str(adapter)).problem
    assert refused(str(checkpoint), {"peft": str(checkpoint)}).field == "model_args.peft"
    assert resolve(str(checkpoint), {"peft": str(adapter)}).peft == str(adapter)


@pytest.mark.parametrize(
    ("missing", "says"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer")],
)
def test_incomplete_folders_are_refused(checkpoint: Path, missing: str, says: str) -> None:
    (checkpoint / missing).unlink()
    assert says in refused(str(checkpoint)).problem


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_bytes(msgspec.json.encode(index))
    assert "model-2.safetensors, which is not there" in refused(str(checkpoint)).problem


def test_a_damaged_config_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[1, 2]")
    assert "config.json cannot be read" in refused(str(checkpoint)).problem


def test_a_model_in_a_subfolder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model" / "inner")
    assert resolve(str(tmp_path / "model"), {"subfolder": "inner"}).subfolder == "inner"


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {"model_type": "llama"},
        {"architectures": None, "model_type": "llama"},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["BertLMHeadModel"], "is_decoder": True},
        {"architectures": ["ReformerModelWithLMHead"]},
        {"architectures": ["ChatGLMModel"], "auto_map": {"AutoModelForCausalLM": "modeling.X"}},
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}},
        {"architectures": ["SomethingNewForGeneration"]},
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
        {"architectures": ["T5WithLMHeadModel"], "model_type": "t5", "is_encoder_decoder": True},
        {"architectures": ["BartModel"], "model_type": "bart", "is_encoder_decoder": True},
        {"architectures": ["MarianMTModel"], "model_type": "marian", "is_encoder_decoder": True},
    ],
)
def test_language_models_are_accepted(config: dict[str, Any]) -> None:
    check_config(config, "model")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "no causal language model"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
        ({"architectures": ["MistralModel"]}, "no causal language model"),
        ({"architectures": ["WhisperX"], "model_type": "speecht5", "is_encoder_decoder": True}, "those that are: bart"),
        (
            {"architectures": ["ProphetNetForConditionalGeneration"], "model_type": "prophetnet"},
            "its decoder lets tokens see those that follow them",
        ),
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "no language model"),
        ({"architectures": ["BartForSequenceClassification"], "model_type": "bart"}, "no language model"),
        ({"architectures": ["InternVLChatModel"], "vision_config": {}}, "no model that continues text"),
        (
            {"architectures": ["BlipForConditionalGeneration"], "vision_config": {}, "model_type": "blip"},
            "no model that",
        ),
    ],
)
def test_other_models_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        check_config(config, "model")


def test_types_that_need_torchvision_are_those_without_another_image_processor() -> None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as NAMES

    needs = {kind for kind in IMAGE_TEXT_TYPES if kind in NAMES and set(NAMES[kind]) == {"torchvision"}}
    assert needs == checkpoints._TORCHVISION_TYPES


def test_images_need_torchvision_in_some_families(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "vision_config": {}}
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    assert checkpoints.modalities(config) == {"text"}
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: name)
    assert checkpoints.modalities(config) == {"text", "image", "video"}


@pytest.mark.parametrize("kind", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_checkpoints_with_a_talker_are_refused_by_name(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="checkpoint of the thinker alone"):
        check_config(
            {"model_type": kind, "thinker_config": {}, "architectures": ["QForConditionalGeneration"]}, "model"
        )


def test_image_text_types_are_those_that_transformers_loads_and_that_continue_text() -> None:
    from transformers.models.auto import modeling_auto

    others = {"blip", "pi0", "diffusion_gemma", "evolla", "pp_formulanet"}  # captions, robots, diffusion, proteins
    encoder_decoders = {"florence2", "pix2struct", "t5gemma2", "udop", "vision-encoder-decoder"}
    known = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert known - others - encoder_decoders == IMAGE_TEXT_TYPES


def test_encoder_decoder_types_are_those_that_transformers_loads_and_that_read_text() -> None:
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    reading = {name for name in known if name == "encoder-decoder" or AutoConfig.for_model(name).is_encoder_decoder}
    assert reading - {"prophetnet"} == ENCODER_DECODER_TYPES


def test_local_models_need_no_hub(checkpoint: Path) -> None:
    args = ModelArgs(pretrained=str(checkpoint), revision="main")
    assert resolve_hub_revision(args) == ModelArgs(pretrained=str(checkpoint))


@pytest.mark.parametrize(("key", "field"), [("pretrained", "model"), ("tokenizer", "model_args.tokenizer")])
def test_an_unreachable_hub_says_what_to_do(checkpoint: Path, key: str, field: str) -> None:
    args = ModelArgs(**{"pretrained": str(checkpoint), key: "nobody/has-this"})
    with pytest.raises(InvalidRequest, match="path to a local copy") as caught:
        resolve_hub_revision(args)
    assert caught.value.field == field


def test_the_local_hub_cache_is_used_offline(tmp_path: Path) -> None:
    """In a process of its own, because the library reads the cache's place when it is imported."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--org--name"
    shutil.copytree(write_checkpoint(tmp_path / "model"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    script = (
        "import sys; from gpu_pool.models import *; from gpu_pool.records import ModelArgs;"
        "args = resolve_hub_revision(ModelArgs(pretrained='org/name', tokenizer='org/name'));"
        "print(args.revision, args.tokenizer, 'torch' in sys.modules)"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    out = subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True).stdout
    assert out.split() == [commit, str(repo / "snapshots" / commit), "False"]


@pytest.mark.parametrize(
    ("config", "files", "reads"),
    [
        ({"model_type": "qwen2_vl"}, ["preprocessor_config.json"], True),
        ({"model_type": "qwen2_vl"}, ["processor_config.json"], True),
        ({"model_type": "qwen2_vl"}, [], False),
        (NEW_IMAGE_TEXT, ["processor_config.json"], True),
        (NEW_IMAGE_TEXT | {"is_encoder_decoder": True}, ["processor_config.json"], False),
        (LLAMA, ["processor_config.json"], False),
        ({"model_type": "t5gemma2", "vision_config": {}}, ["processor_config.json"], False),
    ],
)
def test_which_models_read_images(tmp_path: Path, config: dict[str, Any], files: list[str], reads: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in files:
        (tmp_path / name).write_text("{}")
    assert ("image" in modalities(ModelArgs(pretrained=str(tmp_path)))) is reads


@pytest.mark.parametrize(
    ("model_args", "field"),
    [
        ({"max_images": 0}, "max_images"),
        ({"min_pixels": 500, "max_pixels": 400}, "min_pixels"),
        ({"max_pixels": 400}, "max_pixels"),
        ({"image_max_side": 400, "image_width": 100}, "image_max_side"),
        ({"image_height": -1}, "image_height"),
        ({"interleave": "yes"}, "interleave"),
    ],
)
def test_sizes_and_numbers_of_images(checkpoint: Path, model_args: dict[str, Any], field: str) -> None:
    assert refused("hf-multimodal", {"pretrained": str(checkpoint), **model_args}).field == f"model_args.{field}"


def test_what_is_refused_for_looking_ahead_does_so() -> None:
    """When this fails, transformers has mended it: then the type can be served."""
    import torch
    from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

    sizes = {f"num_{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = ProphetNetConfig(
        vocab_size=50, hidden_size=16, encoder_ffn_dim=16, decoder_ffn_dim=16, init_std=0.3, **sizes
    )
    torch.manual_seed(0)
    model = ProphetNetForConditionalGeneration(config).eval()
    with torch.inference_mode():
        some, more = (
            model(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([ids])).logits[0, :3]
            for ids in ([2, 7, 8], [2, 7, 8, 9, 10])
        )
    assert (some - more).abs().max() > 0.01 * (some.max() - some.min())
