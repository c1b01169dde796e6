"""Does a local folder hold a language model? Decided from file names and config.json, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import msgspec

from gpu_pool.errors import InvalidRequest
from gpu_pool.fingerprint import indexed_shards
from gpu_pool.merge import RANK_FILE, has_shards
from gpu_pool.records import Modality

_ONE_OF_SEVERAL = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_model")
_TOKENIZER_MARKS = ("token", "vocab", "merges", ".model", ".tiktoken", ".spm")

_MULTIMODAL_MARKS = ("vision_config", "audio_config", "mm_vision_tower", "speech_config", "thinker_config")
IMAGE_TEXT_TYPES = frozenset(
    {
        *("aria", "aya_vision", "blip-2", "chameleon", "cohere2_vision", "cohere_compass", "cosmos3_edge"),
        *("cosmos3_omni", "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "dots3_note", "emu3"),
        *("ernie4_5_vl_moe", "exaone4_5", "fast_vlm", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git"),
        *("glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga", "got_ocr2", "granite4_vision"),
        *("granite_docling", "hunyuan_vl", "hyperclovax_vision_v2", "idefics", "idefics2", "idefics3", "inkling2"),
        *("inkling_mm_model", "instructblip", "instructblipvideo", "internvl", "janus", "kimi_k25", "kosmos-2"),
        *("kosmos-2.5", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next", "llava_next_video"),
        *("llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl", "mistral3", "mistral4"),
        *("mistral_large4", "mllama", "molmo2", "muse_glimmer", "muse_spark", "nemotron_h_omni", "ovis2"),
        *("paddleocr_vl", "paligemma", "perception_lm", "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker"),
        *("qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe"),
        *("qwen4_exp", "shieldgemma2", "smolvlm", "step3p7", "unlimited_ocr", "video_llama_3", "video_llava"),
        "vipllava",
    }
)
"""Model types that transformers' AutoModelForImageTextToText loads and that continue text with images in it."""

_TORCHVISION_TYPES = frozenset(
    {
        *("cohere2_vision", "gemma4_unified", "inkling2", "inkling_mm_model", "kimi_k25", "lfm2_vl", "llama4"),
        *("minicpm_ocr", "minimax_m3_vl", "molmo2", "muse_glimmer", "muse_spark", "nemotron_h_omni", "perception_lm"),
        *("step3p7", "unlimited_ocr"),
    }
)
"""Of these, the types whose images transformers processes with torchvision only; without it they read text."""

AUDIO_TEXT_TYPES = frozenset(
    {
        *("gemma3n", "glmasr", "granite_speech", "granite_speech_plus", "qwen2_5_omni_thinker", "qwen2_audio"),
        "qwen3_omni_moe_thinker",
    }
)
"""Model types that transformers' AutoModelForMultimodalLM loads and that continue text with sounds in it."""

SPEECH_TYPES = frozenset({"whisper"})
"""Model types that write down what is said: they hear one sound, and read no prompt."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where a checkpoint says how images and sounds are processed."""

_WITH_TALKER = frozenset({"qwen2_5_omni", "qwen3_omni_moe"})
"""Model types of checkpoints of which a part speaks, and another, that transformers can load alone, writes."""

ENCODER_DECODER_TYPES = frozenset(
    {
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "fsmt", "led", "longt5"),
        *("m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart"),
        *("seamless_m4t", "seamless_m4t_v2", "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5"),
    }
)
"""Model types that transformers' AutoModelForSeq2SeqLM loads, that read text and can be asked for probabilities."""
_LOOKING_AHEAD = frozenset({"prophetnet"})
"""Encoder-decoders whose decoder, as transformers computes it, changes a token's logits by what follows the token."""

_HEADLESS_SUFFIXES = (
    "Model",
    "Encoder",
    "ForAudioClassification",
    "ForCTC",
    "ForImageClassification",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForObjectDetection",
    "ForPreTraining",
    "ForQuestionAnswering",
    "ForReward",
    "ForRewardModeling",
    "ForSequenceClassification",
    "ForTokenClassification",
)
"""Ends of architecture names that have no causal language-model head."""
_BARE_SUFFIX, _ENCODER_SUFFIXES = "Model", ("EncoderModel", "Encoder")
"""A bare encoder-decoder's head is its embedding (BART's base checkpoints are saved so); an encoder has none."""
_CONDITIONAL_SUFFIX = "ForConditionalGeneration"
_OTHER_TYPES = frozenset({"blip", "florence2", "pix2struct", "t5gemma2", "udop"})
"""Model types with images and such a head that are encoder-decoders, or caption images without reading text."""
_HEAD_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "BertGenerationDecoder")


def check_checkpoint(folder: Path, field: str, *, is_merged: bool = True) -> None:
    """Raise InvalidRequest for `field` unless transformers can load a language model from `folder`; where it is not
    `is_merged`, once it has weights."""
    if (folder / "adapter_config.json").is_file():
        raise InvalidRequest(
            field, f"{folder} is a PEFT adapter: give its base model as `pretrained` and this folder as `peft`"
        )
    if is_merged and has_shards(folder) and not _weight_files(folder):
        problem = f'{folder} is a sharded training checkpoint: "merge": "regular" (or "ema") has it merged first'
        raise InvalidRequest(field, f"{problem}, and so does POST /merge")
    config = folder / "config.json"
    if not config.is_file():
        raise InvalidRequest(field, f"{folder} is no model: it has no config.json{_gguf_hint(folder)}")
    check_config(read_config(config, field), field)
    if is_merged:
        _check_weights(folder, field)


def read_config(path: Path, field: str) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequest(field, f"{path} cannot be read: {error}") from error


def check_config(config: Mapping[str, Any], field: str) -> None:
    """Raise InvalidRequest unless this config.json is a language model's; what cannot be told is left to the worker."""
    architectures = _architectures(config)
    name = ", ".join(architectures) or str(config.get("model_type") or "this model")
    if config.get("model_type") in ENCODER_DECODER_TYPES:
        if architectures and all(_lacks_decoder(architecture) for architecture in architectures):
            raise InvalidRequest(field, f"{name} is no language model (such as T5ForConditionalGeneration)")
        return
    if config.get("model_type") in _LOOKING_AHEAD:
        raise InvalidRequest(
            field, f"{name} is not served: in transformers its decoder lets tokens see those that follow them"
        )
    if config.get("model_type") in _WITH_TALKER:
        raise InvalidRequest(
            field, f"{name} has a talker beside its thinker: give a checkpoint of the thinker alone (thinker_config)"
        )
    if config.get("model_type") in AUDIO_TEXT_TYPES | SPEECH_TYPES:
        if architectures and not any(a.endswith(_CONDITIONAL_SUFFIX) for a in architectures):
            raise InvalidRequest(field, f"{name} writes no text (such as WhisperForConditionalGeneration)")
        return
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return
    if reads_images(config) or any(a.endswith(_HEAD_SUFFIXES) for a in architectures):
        return
    if any(mark in config for mark in _MULTIMODAL_MARKS):
        raise InvalidRequest(field, f"{name} is no model that continues text, or text with images in it")
    if config.get("is_encoder_decoder"):
        kinds = ", ".join(sorted(ENCODER_DECODER_TYPES))
        raise InvalidRequest(
            field, f"{name} is an encoder-decoder of a type that is not served; those that are: {kinds}"
        )
    if architectures and all(a.endswith(_HEADLESS_SUFFIXES) for a in architectures):
        raise InvalidRequest(field, f"{name} is no causal language model (an architecture such as LlamaForCausalLM)")


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether this config.json is of a model that continues text with images in it; a new type is told by its parts."""
    if config.get("is_encoder_decoder") or config.get("model_type") in ENCODER_DECODER_TYPES:
        return False
    looks_so = "vision_config" in config and any(a.endswith(_CONDITIONAL_SUFFIX) for a in _architectures(config))
    return config.get("model_type") in IMAGE_TEXT_TYPES or (looks_so and config.get("model_type") not in _OTHER_TYPES)


def modalities(config: Mapping[str, Any]) -> frozenset[Modality]:
    """What a model of this config.json takes, if its processor is there. A video is shown as images."""
    kind = config.get("model_type")
    if kind in SPEECH_TYPES:
        return frozenset({"audio"})
    taken: set[Modality] = {"text"}
    if reads_images(config) and not (kind in _TORCHVISION_TYPES and find_spec("torchvision") is None):
        taken |= {"image", "video"}
    if kind in AUDIO_TEXT_TYPES:
        taken.add("audio")
    return frozenset(taken)


def _lacks_decoder(architecture: str) -> bool:
    if architecture.endswith(_HEAD_SUFFIXES):
        return False
    if architecture.endswith(_BARE_SUFFIX):
        return architecture.endswith(_ENCODER_SUFFIXES)
    return architecture.endswith(_HEADLESS_SUFFIXES)


def check_gguf(path: Path, field: str) -> None:
    """Raise InvalidRequest unless the file at `path` is GGUF; which architectures load is left to the worker."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidRequest(field, f"{path} is not a GGUF file")


def check_tokenizer(folder: Path, field: str) -> None:
    """Raise InvalidRequest unless `folder` holds something that looks like a tokenizer."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not any(mark in name for name in names for mark in _TOKENIZER_MARKS):
        raise InvalidRequest(field, f"{folder} has no tokenizer files; name a tokenizer in `model_args.tokenizer`")


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in cast("list[Any]", names)] if isinstance(names, list) else []


def _gguf_hint(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.gguf"))[:5]
    return f"; choose one of its GGUF files with `gguf_file`: {', '.join(files)}" if files else ""


def _weight_files(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.endswith(_WEIGHT_SUFFIXES)
        and not path.name.startswith(_NOT_WEIGHTS)
        and not RANK_FILE.fullmatch(path.name)
    )


def _check_weights(folder: Path, field: str) -> None:
    names = [path.name for path in folder.iterdir()]
    indexes = [name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))]
    for index in indexes:
        missing = sorted(name for name in indexed_shards(folder / index) if not (folder / name).is_file())
        if missing:
            raise InvalidRequest(field, f"{folder} is incomplete: {index} lists {missing[0]}, which is not there")
    weights = _weight_files(folder)
    if not indexes and not weights:
        raise InvalidRequest(field, f"{folder} is no model: it has no weights (*.safetensors or *.bin)")
    if not indexes and all(_ONE_OF_SEVERAL.fullmatch(name) for name in weights):
        problem = f"{weights[0]} is one of several files, and their index (*.index.json) is not there"
        raise InvalidRequest(field, f"{folder} is incomplete: {problem}")
