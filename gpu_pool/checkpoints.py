"""Does a local folder hold a language model? Decided from file names and config.json, without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import msgspec

from gpu_pool.errors import InvalidRequest
from gpu_pool.fingerprint import indexed_shards
from gpu_pool.merge import RANK_FILE, has_shards

_ONE_OF_SEVERAL = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_model")
_TOKENIZER_MARKS = ("token", "vocab", "merges", ".model", ".tiktoken", ".spm")

_MULTIMODAL_MARKS = ("vision_config", "audio_config", "mm_vision_tower", "speech_config", "thinker_config")
CAUSAL_MULTIMODAL_TYPES = frozenset(
    {
        *("dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2"),
        *("llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    }
)
"""Model types whose text part transformers' AutoModelForCausalLM loads from a multimodal checkpoint."""

ENCODER_DECODER_TYPES = frozenset(
    {
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "fsmt", "led", "longt5"),
        *("m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet"),
        *("seamless_m4t", "seamless_m4t_v2", "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5"),
    }
)
"""Model types that transformers' AutoModelForSeq2SeqLM loads and that read text."""

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


def check_config(config: dict[str, Any], field: str) -> None:
    """Raise InvalidRequest unless this config.json is a language model's; what cannot be told is left to the worker."""
    architectures = _architectures(config)
    name = ", ".join(architectures) or str(config.get("model_type") or "this model")
    if config.get("model_type") in ENCODER_DECODER_TYPES:
        if architectures and all(_lacks_decoder(architecture) for architecture in architectures):
            raise InvalidRequest(field, f"{name} is no language model (such as T5ForConditionalGeneration)")
        return
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        return
    if config.get("model_type") in CAUSAL_MULTIMODAL_TYPES or any(a.endswith(_HEAD_SUFFIXES) for a in architectures):
        return
    if any(mark in config for mark in _MULTIMODAL_MARKS):
        raise InvalidRequest(field, f"multimodal models are not served yet ({name})")
    if config.get("is_encoder_decoder"):
        kinds = ", ".join(sorted(ENCODER_DECODER_TYPES))
        raise InvalidRequest(
            field, f"{name} is an encoder-decoder of a type that is not served; those that are: {kinds}"
        )
    if architectures and all(a.endswith(_HEADLESS_SUFFIXES) for a in architectures):
        raise InvalidRequest(field, f"{name} is no causal language model (an architecture such as LlamaForCausalLM)")


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


def _architectures(config: dict[str, Any]) -> list[str]:
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
