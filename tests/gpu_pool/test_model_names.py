from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_pool import models
from gpu_pool.checkpoints import AUDIO_TEXT_TYPES, IMAGE_TEXT_TYPES, SPEECH_TYPES, check_config
from gpu_pool.errors import InvalidRequest
from gpu_pool.model_arguments import decode, known_arguments
from gpu_pool.model_names import FLAGS, MEANINGLESS, MEANINGLESS_VALUES, MODEL_NAMES, RENAMED, SAME_WEIGHTS
from gpu_pool.models import resolve_model, why_not
from gpu_pool.records import ModelArgs


def resolve(model: str, **model_args: Any) -> ModelArgs:
    return resolve_model(model, model_args, allow_remote_code=False)


def refused(model: str, **model_args: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        resolve(model, **model_args)
    return caught.value


@pytest.mark.parametrize("library", ["lmms_eval", "lm_eval"])
def test_every_name_of_the_libraries_is_known(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    names = {
        "lmms_eval": "from lmms_eval.models import list_available_models; print(*list_available_models(True))",
        "lm_eval": "from lm_eval.models import MODEL_MAPPING; print(*MODEL_MAPPING)",
    }[library]
    said = subprocess.run([sys.executable, "-c", names], check=True, capture_output=True, text=True).stdout.split()
    assert len(said) > 30
    assert set(said) - set(MODEL_NAMES) == set()


def test_every_name_runs_or_says_why_not_and_what_does() -> None:
    for name in MODEL_NAMES.values():
        if why_not(name, ("chat", "completions")):
            assert name.nearest, name
            assert all(MODEL_NAMES[near].runs_on in ("engine", "api") for near in name.nearest), name
        else:
            assert name.runs_on in ("engine", "api")


def test_defaults_are_those_of_the_references_classes() -> None:
    package = importlib.util.find_spec("lmms_eval")
    if package is None or not package.submodule_search_locations:
        pytest.skip("lmms_eval is not installed")
    folder = Path(package.submodule_search_locations[0]) / "models"
    checked = 0
    for name in {entry.name: entry for entry in MODEL_NAMES.values() if entry.defaults}.values():
        for file in [file for kind in ("simple", "chat") if (file := folder / kind / f"{name.name}.py").exists()]:
            theirs = constructor_defaults(file)
            if theirs:
                assert name.defaults == theirs, name.name
                checked += 1
    assert checked > 10


def constructor_defaults(file: Path) -> dict[str, int]:
    """The numbers of frames and pixels that a class of the reference has by default, in our words."""
    module = ast.parse(file.read_text())
    assigned = [(target, node.value) for node in module.body if isinstance(node, ast.Assign) for target in node.targets]
    constants = {target.id: value for target, value in assigned if isinstance(target, ast.Name)}
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    signature = next((function.args for function in functions if function.name == "__init__"), None)
    if signature is None:  # the other file of that name has it
        return {}
    given = signature.args[len(signature.args) - len(signature.defaults) :]
    values = {arg.arg: value for arg, value in zip(given, signature.defaults, strict=True)}
    found = {RENAMED.get(key, key): constants.get(getattr(value, "id", ""), value) for key, value in values.items()}
    wanted = {"num_frames", "min_pixels", "max_pixels"}
    wanted -= {"min_pixels", "max_pixels"} if "gemma" in file.stem else set()  # its processor takes none
    wanted -= {"num_frames"} if file.stem == "qwen3_5" else set()  # it takes two a second
    return {key: eval(ast.unparse(found[key])) for key in wanted if key in found}


def test_what_a_request_says_goes_before_a_names_defaults(tiny_model: Path, tiny_vlm: Callable[[str], Path]) -> None:
    folder = str(tiny_vlm("qwen2_5_vl"))
    assert resolve("qwen2_5_vl", pretrained=folder).max_pixels == 1605632
    assert resolve("qwen2_5_vl", pretrained=folder, max_num_frames=4).num_frames == 4
    small = resolve("qwen2_5_vl", pretrained=folder, max_pixels=50176)
    assert (small.min_pixels, small.max_pixels) == (None, 50176)
    assert resolve("hf", pretrained=folder).max_pixels is None
    assert resolve("qwen2_5_vl", pretrained=str(tiny_model)).max_pixels == 1605632, "text is read all the same"


MODEL_TYPES = {
    "aria": "aria",
    "async_hf_model": "qwen2_5_vl",
    "fuyu": "fuyu",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "glm4v": "glm46v",
    "huggingface": "qwen2_5_vl",
    "idefics2": "idefics2",
    "instructblip": "instructblip",
    "internvl3": "internvl",
    "internvl3_5": "internvl",
    "internvl_hf": "internvl",
    "lfm2_5_vl": "lfm2_vl",
    "llama4_scout": "llama4",
    "llama_vision": "mllama",
    "llava": "llava",
    "llava_hf": "llava",
    "llava_onevision": "llava_onevision",
    "llava_vid": "llava",
    "mistral3_vl": "mistral3",
    "plm": "perception_lm",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_audio": "qwen2_audio",
    "qwen2_vl": "qwen2_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_vl": "qwen3_vl",
    "video_llava": "video_llava",
    "whisper": "whisper",
}
"""`model_type` in the config.json of each default checkpoint."""


def test_default_checkpoints_are_of_types_that_are_served() -> None:
    names = {name.name for name in MODEL_NAMES.values() if name.runs_on == "engine" and name.pretrained}
    assert names - {"async_hf"} == MODEL_TYPES.keys()
    for model_type in MODEL_TYPES.values():
        check_config({"model_type": model_type, "architectures": ["XForConditionalGeneration"]}, "model")
        assert model_type in IMAGE_TEXT_TYPES | AUDIO_TEXT_TYPES | SPEECH_TYPES


@pytest.mark.parametrize("model", ["llama4_scout", "lfm2_5_vl", "plm"])
def test_a_missing_package_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert "torchvision alone, which is not installed" in refused(model).problem
    monkeypatch.setattr(models, "find_spec", lambda name: name)
    assert why_not(MODEL_NAMES[model]) is None


def test_default_checkpoints_are_none_that_transformers_cannot_load() -> None:
    defaults = {name.pretrained for name in MODEL_NAMES.values() if name.pretrained}
    assert not defaults & SAME_WEIGHTS.keys()
    assert all(default.count("/") == 1 for default in defaults)


@pytest.mark.parametrize(
    ("model", "checkpoint"),
    [
        ("llava", "llava-hf/llava-1.5-7b-hf"),
        ("llava_onevision", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        ("qwen2_5_vl", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("async_hf", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ],
)
def test_a_family_has_a_checkpoint_of_its_own(model: str, checkpoint: str) -> None:
    assert resolve(model) == ModelArgs(pretrained=checkpoint, **MODEL_NAMES[model].defaults)
    assert resolve(model, pretrained="org/other").pretrained == "org/other"


def test_a_family_without_one_needs_to_be_told() -> None:
    assert refused("hf").field == "model_args.pretrained"
    assert "VideoLLaMA3-2B-Image-HF" in refused("videollama3").problem
    assert refused("llava", pretrained="").field == "model_args.pretrained"


def test_the_originals_of_llava_are_refused_with_the_same_weights() -> None:
    error = refused("llava", pretrained="liuhaotian/llava-v1.5-7b")
    assert (error.field, error.choices) == ("model_args.pretrained", ("llava-hf/llava-1.5-7b-hf",))


@pytest.mark.parametrize(
    ("model", "says", "nearest"),
    [
        ("wan2_1_t2i", "makes images", "qwen2_5_vl"),
        ("cogvlm2", "code of their own", "qwen2_5_vl"),
        ("claude", "own protocol", "openai"),
        ("neuronx", "runtime", "hf"),
        ("vllm", "the package vllm, which is not installed", "hf"),
        ("sglang", "the package sglang, which is not installed", "hf"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason_and_the_nearest(model: str, says: str, nearest: str) -> None:
    error = refused(model, pretrained="org/name")
    assert error.field == "model"
    assert says in error.problem
    assert nearest in error.choices


def test_documented_arguments_have_our_names() -> None:
    given = {
        "pretrained": "org/name",
        "torch_dtype": "half",
        "use_flash_attention_2": False,
        "device_map": "auto",
        "interleave_visuals": False,
        "max_image_size": 448,
        "max_pixels": 1605632,
        "conv_template": "vicuna_v1",
        "use_cache": True,
        "device": "cuda:0",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "token_strategy": "single",
    }
    expected = ModelArgs(
        pretrained="org/name", dtype="float16", interleave=False, image_max_side=448, max_pixels=1605632
    )
    assert decode(given) == expected
    assert decode({"model": "org/name", "use_flash_attn": True}).attn_implementation == "flash_attention_2"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("device_map", "cuda:1", "num_gpus"),
        ("device", "cpu", "beside `model_args`"),
        ("batch_size", 8, "beside `model_args`"),
        ("mm_spatial_pool_stride", 4, "as the checkpoint's class does"),
        ("token_strategy", "multiple", "each frame"),
        ("reasoning_prompt", "Think.", "post_prompt"),
        ("use_flash_attn", "yes", "true or false"),
        ("torch_dtype", "float32", "another value"),
        ("system_prompt", "Be brief.", "system_instruction"),
        ("max_new_tokens", 4096, "gen_kwargs"),
        ("chat_template", "x.jinja", "apply_chat_template"),
        ("api_key", "sk-secret", "behind an endpoint"),
        ("tensor_parallel_size", 2, "unknown"),
    ],
)
def test_arguments_that_ask_for_something_else_are_refused(key: str, value: object, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        decode({"pretrained": "org/name", "dtype": "float16", key: value})
    assert caught.value.field == f"model_args.{key}"
    assert "sk-secret" not in str(caught.value)


def test_the_list_of_arguments_is_what_is_accepted() -> None:
    known = known_arguments()
    assert known.keys() == {*ModelArgs.__struct_fields__, *RENAMED, *FLAGS, *MEANINGLESS}
    assert known["torch_dtype"] == ("dtype", None)
    assert known["conv_template"][0] is None
    assert MEANINGLESS_VALUES.keys() <= MEANINGLESS.keys()
    assert not MEANINGLESS.keys() & ModelArgs.__struct_fields__
