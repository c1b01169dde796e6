# pyright: basic
"""Loads a causal language model as lm-eval's HF backend does, and knows how it may be called."""

from __future__ import annotations

import inspect
import itertools
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.batching import CPU_LIMITS, CUDA_LIMITS, Limits
from gpu_pool.worker.engine.padding import Company, probe_company
from gpu_pool.worker.engine.tokenizer import load_tokenizer

DEFAULT_MAX_LENGTH = 2048
"""lm-eval's context length of a model that states none."""
_LENGTH_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")


class UnsupportedModel(Exception):
    """Only causal (decoder-only) language models can be evaluated."""

    def __str__(self) -> str:
        return super().__str__() or (self.__doc__ or "")


class NoGpuVisible(Exception):
    """The model is to run on a GPU, but CUDA shows none."""

    def __str__(self) -> str:
        return self.__doc__ or ""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to be called, and the facts about it that the calls depend on."""

    model: Any
    tokenizer: Any
    device: torch.device
    """Where input ids go (the first device of a model that is spread over several)."""
    max_length: int
    prefix_token_id: int
    think_end_token: str | int | None
    softmax_dtype: torch.dtype
    limits: Limits
    forward_names: frozenset[str]
    """Keyword arguments that the model's own forward takes."""

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def attn_implementation(self) -> str:
        return str(getattr(self.model.config, "_attn_implementation", None) or "eager")

    @property
    def narrows_logits(self) -> bool:
        """Whether forward can leave out the logits of positions that nobody scores."""
        return "logits_to_keep" in self.forward_names and not _has_virtual_tokens(self.model)

    @cached_property
    def company(self) -> Company:
        """Which prompts may be continued together."""
        return probe_company(self.model)

    def logits(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [rows, len(positions), vocabulary] of right-padded `ids` [rows, width] at `positions` (ascending).

        No attention mask: causal attention never looks at the padding behind a sequence.
        """
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self.forward_names else {}
        if self.narrows_logits:
            return self.model(input_ids=ids, logits_to_keep=positions, **options).logits
        logits = self.model(input_ids=ids, **options).logits
        virtual_tokens = logits.shape[1] - ids.shape[1]
        return logits[:, positions.to(logits.device) + virtual_tokens]

    def check_tokens(self, sequences: Any) -> None:
        """Refuse ids outside the vocabulary: on a GPU they would end the process.

        Raises:
            ValueError: a sequence holds such an id.
        """
        size = self.model.get_input_embeddings().weight.shape[0]
        tokens = list(itertools.chain.from_iterable(sequences))
        if tokens and not 0 <= min(tokens) <= max(tokens) < size:
            raise ValueError(f"token ids must lie in 0..{size - 1}; found {min(tokens)} to {max(tokens)}")

    def memory_bytes(self) -> int:
        """Memory held: of all visible GPUs, or of this process on a CPU."""
        if self.device.type == "cuda":
            return sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def describe(self) -> str:
        """One line for people."""
        name = type(_unwrapped(self.model)).__name__
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        return f"{name}, {millions:.1f} M parameters, {self.dtype}, {self.attn_implementation} attention"


def load_model(spec: ModelSpec, *, allow_remote_code: bool) -> LoadedModel:
    """Load the model, its adapter and tokenizer from `spec.args`.

    Raises:
        NoGpuVisible: it should run on a GPU and there is none.
        UnsupportedModel: it is not a causal language model.
        OSError, ValueError, …: whatever transformers says of a checkpoint that it cannot load.
    """
    args = split_gguf(spec.args)
    remote_code = args.trust_remote_code and allow_remote_code
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(args, trust_remote_code=remote_code)
    model = _load_weights(args, spec.device, tokenizer, trust_remote_code=remote_code)
    return wrap_model(model, tokenizer, args)


def wrap_model(model: Any, tokenizer: Any, args: ModelArgs) -> LoadedModel:
    """What the engine must know of a model that is already in memory."""
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=model.get_input_embeddings().weight.device,
        max_length=args.max_length or _stated_max_length(model.config, tokenizer),
        prefix_token_id=_prefix_token_id(args, tokenizer),
        think_end_token=_think_end_token(args),
        softmax_dtype=getattr(torch, args.softmax_dtype) if args.softmax_dtype else torch.float32,
        limits=CUDA_LIMITS if model.device.type == "cuda" else CPU_LIMITS,
        forward_names=frozenset(inspect.signature(_unwrapped(model).forward).parameters),
    )


def split_gguf(args: ModelArgs) -> ModelArgs:
    """`args` with a `pretrained` that is a GGUF file itself written as folder and `gguf_file`."""
    path = Path(args.pretrained)
    if path.suffix != ".gguf":
        return args
    return msgspec.structs.replace(args, pretrained=str(path.parent), gguf_file=path.name)


def _load_weights(args: ModelArgs, device: str, tokenizer: Any, *, trust_remote_code: bool) -> Any:
    source: dict[str, Any] = {
        "revision": args.revision or "main",
        "subfolder": args.subfolder or "",
        "gguf_file": args.gguf_file,
        "trust_remote_code": trust_remote_code,
    }
    config = transformers.AutoConfig.from_pretrained(args.pretrained, **source)
    if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModel(f"{config.model_type} is an encoder-decoder model; only causal models can be evaluated")
    if args.attn_implementation:
        source["attn_implementation"] = args.attn_implementation
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.pretrained,
        dtype=args.dtype if args.dtype == "auto" else getattr(torch, args.dtype),
        device_map=_device_map(device),
        **source,
    )
    if args.peft:
        model = _add_adapter(model, args, tokenizer)
    _own_memory(model)
    return model.eval()


def _device_map(device: str) -> dict[str, str] | str:
    if device == "cpu":
        return {"": "cpu"}
    if not torch.cuda.is_available():
        raise NoGpuVisible
    return {"": "cuda:0"} if torch.cuda.device_count() == 1 else "auto"


def _add_adapter(model: Any, args: ModelArgs, tokenizer: Any) -> Any:
    """The PEFT adapter on top of `model`, whose embedding is resized first where the tokenizer has other tokens."""
    from peft import PeftModel

    text_config = getattr(model.config, "text_config", None) or model.config
    if text_config.vocab_size != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, str(args.peft), revision=args.revision or "main")


def _own_memory(model: Any) -> None:
    """Copy weights that are still mapped from the file: overwriting it in place would change or kill this replica."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_virtual_tokens(model: Any) -> bool:
    adapter = getattr(model, "active_peft_config", None)
    return bool(adapter is not None and adapter.is_prompt_learning)


def _stated_max_length(config: Any, tokenizer: Any) -> int:
    text_config = getattr(config, "text_config", None) or config
    for name in _LENGTH_NAMES:
        if (value := getattr(text_config, name, None)) is not None:
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
