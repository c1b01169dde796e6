# pyright: basic
"""Loads a model with its tokenizer, and finds out what the engine must know of it."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.adapters import unwrapped
from gpu_pool.worker.engine.announcing import announce
from gpu_pool.worker.engine.configs import text_config
from gpu_pool.worker.engine.cpu_layers import lay_out_weights
from gpu_pool.worker.engine.limits import confine, find_limits
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.processing import PromptProcessor
from gpu_pool.worker.engine.processors import NoProcessor, load_processor
from gpu_pool.worker.engine.routes import Route
from gpu_pool.worker.engine.sharding import why_not_sharded
from gpu_pool.worker.engine.tokenizer import load_tokenizer
from gpu_pool.worker.engine.weights import UnsupportedModel, load_weights, read_config, takes_media

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 2048
"""lm-eval's context length of a model that states none."""
_LENGTH_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")


def choose_ranks(spec: ModelSpec, wanted: int, *, allow_remote_code: bool) -> int:
    """How many processes to shard the model over: `wanted`, or 1 where it can only be spread by a device map.

    Raises:
        UnsupportedModel: it is to run on the CPU, where there are no devices to spread it over.
        OSError, ValueError, …: whatever transformers says of a config that it cannot load.
    """
    if wanted == 1:
        return 1
    args = split_gguf(spec.args)
    config = read_config(args, trust_remote_code=args.trust_remote_code and allow_remote_code)
    reason = why_not_sharded(config, args, wanted)
    if reason is None:
        return wanted
    if spec.device == "cpu":
        raise UnsupportedModel(f"it cannot be sharded over {wanted} processes: {reason}")
    logger.warning("%s is spread over the GPUs layer by layer, not sharded: %s", args.pretrained, reason)
    return 1


def load_model(spec: ModelSpec, *, allow_remote_code: bool, ranks: int = 1, budget: int = 0) -> LoadedModel:
    """Load the model, its adapter and tokenizer from `spec.args`, into at most `budget` bytes of each GPU (0: all).

    With several `ranks` it is this process's shard, and torch.distributed is initialised: every rank loads, and later
    calls the model with the same inputs; each gets the same, whole output.

    Raises:
        NoGpuVisible: it should run on a GPU and there is none.
        UnsupportedModel: it is no language model that can be evaluated.
        OSError, ValueError, …: whatever transformers says of a checkpoint that it cannot load.
    """
    args = split_gguf(spec.args)
    remote_code = args.trust_remote_code and allow_remote_code
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(args, trust_remote_code=remote_code)
    if budget and spec.device == "cuda":
        confine(budget)
    model = load_weights(args, spec.device, ranks, tokenizer, trust_remote_code=remote_code)
    if spec.device == "cpu":
        lay_out_weights(model)
    processor = _processor(model, tokenizer, args, remote_code)
    loaded = wrap_model(model, tokenizer, args, budget, processor)
    route, reason = loaded.route  # decided and measured here: all ranks must take part
    announce(f"{route} route: {reason}")
    if route is Route.TREE:
        announce(f"keys and values take {loaded.token_bytes:,} bytes a token")
    if loaded.processor:
        announce(f"media: {loaded.media}")
    return loaded


def _processor(model: Any, tokenizer: Any, args: ModelArgs, trust_remote_code: bool) -> PromptProcessor | str | None:
    """The processor of a model that takes images or sounds, or why it has none: it serves prompts of text."""
    config = unwrapped(model).config
    if not takes_media(config):
        return None
    try:
        processor = load_processor(args, config.model_type, trust_remote_code=trust_remote_code)
    except NoProcessor as error:
        logger.warning("%s reads text only: %s", args.pretrained, error)
        return f"the model's processor cannot be loaded: {error}"
    return PromptProcessor(processor, config, args, tokenizer.pad_token_id)


def wrap_model(
    model: Any, tokenizer: Any, args: ModelArgs, budget: int = 0, processor: PromptProcessor | str | None = None
) -> LoadedModel:
    """What the engine must know of a model that is already in memory; `budget` as in `limits.free_bytes`.

    `processor` is a string where there should be one: why there is none.
    """
    has_none = isinstance(processor, str)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=model.get_input_embeddings().weight.device,
        max_length=args.max_length or _stated_max_length(model.config, tokenizer),
        prefix_token_id=_prefix_token_id(args, tokenizer),
        think_end_token=_think_end_token(args),
        softmax_dtype=getattr(torch, args.softmax_dtype) if args.softmax_dtype else torch.float32,
        limits=find_limits(model, model.get_input_embeddings().weight.device, budget),
        forward_names=frozenset(inspect.signature(unwrapped(model).forward).parameters),
        processor=None if has_none else processor,
        no_media=processor if has_none else None,
        speech={name: value for name in ("language", "task") if (value := getattr(args, name)) is not None},
    )


def split_gguf(args: ModelArgs) -> ModelArgs:
    """`args` with a `pretrained` that is a GGUF file itself written as folder and `gguf_file`."""
    path = Path(args.pretrained)
    if path.suffix != ".gguf":
        return args
    return msgspec.structs.replace(args, pretrained=str(path.parent), gguf_file=path.name)


def _stated_max_length(config: Any, tokenizer: Any) -> int:
    for name in _LENGTH_NAMES:
        if (value := getattr(text_config(config), name, None)) is not None:
            return int(value)
    stated = tokenizer.model_max_length
    return DEFAULT_MAX_LENGTH if stated is None or stated >= VERY_LARGE_INTEGER else int(stated)


def _prefix_token_id(args: ModelArgs, tokenizer: Any) -> int:
    """What a sequence without context is conditioned on.

    Raises:
        UnsupportedModel: the tokenizer has no such token and the request names none.
    """
    for token_id in (args.prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UnsupportedModel("its tokenizer has neither a BOS nor an EOS token; give prefix_token_id in model_args")


def _think_end_token(args: ModelArgs) -> str | int | None:
    token = args.think_end_token
    return int(token) if isinstance(token, str) and token.isdigit() else token
