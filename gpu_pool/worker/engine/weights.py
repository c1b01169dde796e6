# pyright: basic
"""Reads a checkpoint's weights as lm-eval's HF backend does: by which class, in which type, onto which device."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from gpu_pool import checkpoints
from gpu_pool.quantization import bitsandbytes_options
from gpu_pool.records import ModelArgs
from gpu_pool.worker.engine.adapters import add_adapter, has_virtual_tokens


class UnsupportedModel(Exception):
    """Only language models that read and write text can be evaluated."""

    def __str__(self) -> str:
        return super().__str__() or (self.__doc__ or "")


class NoGpuVisible(Exception):
    """The model is to run on a GPU, but CUDA shows none."""

    def __str__(self) -> str:
        return self.__doc__ or ""


def load_weights(args: ModelArgs, device: str, ranks: int, tokenizer: Any, *, trust_remote_code: bool) -> Any:
    """The transformers model in evaluation mode, inside its PEFT adapter if it has one; `tokenizer` is its own.

    With several `ranks` it is this process's shard.

    Raises:
        NoGpuVisible: it should run on a GPU and there is none.
        UnsupportedModel: it is no language model that can be evaluated.
        OSError, ValueError, …: whatever transformers says of a checkpoint that it cannot load.
    """
    source = _source(args, trust_remote_code)
    config = read_config(args, trust_remote_code=trust_remote_code)
    auto_class = _auto_class(config)
    if args.attn_implementation:
        source["attn_implementation"] = args.attn_implementation
    if (quantization := bitsandbytes_options(args)) is not None:
        source["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
    if device == "cpu" and _is_quantised(config):
        source["disable_mmap"] = True  # quantisers keep tensors where `_own_memory` would not find them
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of its own casts at every multiplication
    model = auto_class.from_pretrained(
        args.pretrained,
        dtype=args.dtype if args.dtype == "auto" else getattr(torch, args.dtype),
        **_placement(device, ranks),
        **source,
    )
    if args.peft:
        model = add_adapter(model, args, tokenizer)
        if model.config.is_encoder_decoder and has_virtual_tokens(model):
            raise UnsupportedModel("an adapter of learnt prompt tokens on an encoder-decoder model cannot be evaluated")
    _own_memory(model)
    return model.eval()


def read_config(args: ModelArgs, *, trust_remote_code: bool) -> Any:
    """The checkpoint's transformers config.

    Raises:
        OSError, ValueError: whatever transformers says of one that it cannot load.
    """
    return transformers.AutoConfig.from_pretrained(args.pretrained, **_source(args, trust_remote_code))


def _source(args: ModelArgs, trust_remote_code: bool) -> dict[str, Any]:
    return {
        "revision": args.revision or "main",
        "subfolder": args.subfolder or "",
        "gguf_file": args.gguf_file,
        "trust_remote_code": trust_remote_code,
    }


def _placement(device: str, ranks: int) -> dict[str, Any]:
    """Where from_pretrained shall put the weights: this rank's shard on its own device, or all by a device map."""
    if ranks == 1:
        return {"device_map": _device_map(device)}
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise NoGpuVisible
    return {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan="auto")}


def _auto_class(config: Any) -> Any:
    """transformers' loader for a model of this configuration (lm-eval's `_get_backend`, and its `hf-multimodal`).

    Raises:
        UnsupportedModel: lm-eval would call it an encoder-decoder, but it is none.
    """
    if config.model_type in checkpoints.SPEECH_TYPES:
        return transformers.AutoModelForSpeechSeq2Seq
    if reads_images(config):
        return transformers.AutoModelForImageTextToText
    if takes_media(config):
        return transformers.AutoModelForMultimodalLM
    if config.model_type not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    if not config.is_encoder_decoder and config.model_type in checkpoints.ENCODER_DECODER_TYPES:
        raise UnsupportedModel(
            f"this is the decoder of a {config.model_type} model alone; only with its encoder can it be evaluated"
        )
    if not config.is_encoder_decoder:
        raise UnsupportedModel(f"{config.model_type} is a speech model; only models that read text can be evaluated")
    return transformers.AutoModelForSeq2SeqLM


def reads_images(config: Any) -> bool:
    """Whether this is the configuration of a model that continues text with images in it."""
    known = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return known and checkpoints.reads_images(config.to_dict())


def takes_media(config: Any) -> bool:
    """Whether this is the configuration of a model that takes images or sounds."""
    return reads_images(config) or config.model_type in checkpoints.AUDIO_TEXT_TYPES | checkpoints.SPEECH_TYPES


def _device_map(device: str) -> dict[str, str] | str:
    if device == "cpu":
        return {"": "cpu"}
    if not torch.cuda.is_available():
        raise NoGpuVisible
    return {"": "cuda:0"} if torch.cuda.device_count() == 1 else "auto"


def _own_memory(model: Any) -> None:
    """Copy weights that are still mapped from the file: overwriting it in place would change or kill this replica."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type != "cpu":
            continue
        if isinstance(tensor, DTensor):  # setting its data would not reach the shard within
            torch.utils.swap_tensors(tensor, torch.nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
        else:
            tensor.data = tensor.data.clone()


def _is_quantised(config: Any) -> bool:
    parts = (config, config.get_text_config(decoder=True))
    return any(getattr(part, "quantization_config", None) is not None for part in parts)
