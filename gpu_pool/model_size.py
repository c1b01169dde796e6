"""How much memory a replica needs, from its checkpoint's headers and configuration, before anything is loaded.

    need of each of k GPUs = replicated + (weights - replicated) / k + room
    room = process + (keys and values + activations + logits) / GIVEN_OUT,
           of KEPT_TOKENS, PASS_TOKENS and SCORED_POSITIONS tokens

`weights` are the bytes of the parameters in the type that they are loaded in. `replicated` are those that sharding does
not divide: embeddings and vectors; it is also what one GPU may get more than another when whole layers are spread. The
room is what the engine needs to work at a sensible pace, not the most that it can use: it takes what is free (see
`worker/engine/limits.py`, whose shares of the free memory add up to GIVEN_OUT).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec

from gpu_pool.gguf_header import GgufHeader, read_gguf_header
from gpu_pool.quantization import quantization_method
from gpu_pool.records import Device, ModelArgs, Record
from gpu_pool.weight_files import FLOATS, TYPE_BITS, Tensor, WeightFiles, finder, read_adapter, read_weight_files
from gpu_pool.weight_types import loaded_bytes, once

GIB = 1024**3

PROCESS_BYTES = {"cuda": GIB, "cpu": GIB // 2}
"""What a worker takes beside weights and tensors: on a GPU the CUDA context and the libraries' workspaces, on a CPU the
interpreter with torch and transformers."""
KEPT_TOKENS = 8192
"""Tokens whose keys and values are held; more where the request asks for longer sequences (`max_length`)."""
PASS_TOKENS = 2048
"""Tokens of a forward pass: half of what `limits` calls worthwhile on a GPU; slower is better than refused."""
SCORED_POSITIONS = 512
"""Positions of a forward pass whose logits are held, in fp32."""
GIVEN_OUT = 0.8
"""Share of the free memory that the engine plans with."""

_HIDDEN = ("hidden_size", "n_embd", "d_model")


class ReplicaSize(Record, frozen=True, kw_only=True):
    """Memory that a replica of a model needs, in bytes."""

    weights_bytes: int
    replicated_bytes: int = 0
    """Of the weights, those that every GPU of several holds whole."""
    room_bytes: int
    """On each GPU, beside its weights."""
    heads: tuple[int, ...] = ()
    """Counts of attention heads that sharding must divide evenly; empty where the model cannot be sharded."""
    estimated: bool = False
    """The weights are counted by the size of files that do not tell what is in them."""

    def bytes_on_each(self, count: int) -> int:
        """Memory needed on each of `count` GPUs."""
        divided = self.weights_bytes - self.replicated_bytes
        return self.replicated_bytes + -(-divided // count) + self.room_bytes

    def divides_by(self, count: int) -> bool:
        """Whether the model can be sharded over `count` GPUs, as far as its heads tell."""
        return bool(self.heads) and all(heads % count == 0 for heads in self.heads)


class Shape(Record, frozen=True, kw_only=True):
    """Widths of a model, for what it computes beside its weights; 0 where the configuration does not say."""

    layers: int = 0
    hidden: int = 0
    inner: int = 0
    experts: int = 1
    """Of a layer, those that a token goes through."""
    query_heads: int = 0
    key_value_heads: int = 0
    kept_width: int = 0
    """Elements of a token's keys and values, of all layers together."""
    vocabulary: int = 0


def replica_size(args: ModelArgs, device: Device) -> ReplicaSize | None:
    """The memory that a replica of `args` needs; None where no file tells. Reads headers, or asks the hub.

    `args` are resolved (`gpu_pool.models`): a hub id has its commit, an adapter is a local folder.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not what its name says.
    """
    if args.gguf_file is not None:
        return _gguf_size(args, device)
    weights = read_weight_files(args)
    if weights is None:
        return None
    config = _read_config(args)
    dtype = _load_type(args, config, weights)
    sizes = [(tensor, loaded_bytes(tensor, dtype, args, config, device)) for tensor in once(weights.tensors, config)]
    opaque = weights.opaque_bytes * TYPE_BITS[dtype] // TYPE_BITS[_stated_type(config) or dtype]
    shape = _shape(config)
    adapter, adapter_estimated = _adapter_bytes(args)
    return ReplicaSize(
        weights_bytes=opaque + adapter + sum(size for _, size in sizes),
        replicated_bytes=adapter + sum(size for tensor, size in sizes if _is_replicated(tensor.name, tensor.shape)),
        room_bytes=_room(shape, TYPE_BITS[dtype] // 8, args, device),
        heads=() if args.peft or quantization_method(config) else _head_counts(shape),
        estimated=weights.opaque_bytes > 0 or adapter_estimated,
    )


def activation_bytes(hidden: int, inner: int, experts: int, itemsize: int) -> int:
    """Memory of a token's activations in the widest part of a layer, at least in fp32 as attention and norms are.

    Twice the residual stream with queries, keys and values (8 widths) and the inner width three times: input and output
    of the widest product are held at once.
    """
    return 2 * (8 * hidden + 3 * experts * (inner or 4 * hidden)) * max(itemsize, 4)


def widest(value: object) -> int:
    """A width as configurations give it: a number, or a list of the layers' own, then the largest; 0 for none."""
    widths = cast("list[object]", value) if isinstance(value, list | tuple) else [value]
    return max((int(width) for width in widths if isinstance(width, int | float)), default=0)


def _room(shape: Shape, itemsize: int, args: ModelArgs, device: str) -> int:
    kept = max(KEPT_TOKENS, args.max_length or 0) * shape.kept_width * itemsize
    activations = PASS_TOKENS * activation_bytes(shape.hidden, shape.inner, shape.experts, itemsize)
    logits = SCORED_POSITIONS * 4 * shape.vocabulary
    return PROCESS_BYTES[device] + int((kept + activations + logits) / GIVEN_OUT)


def _is_replicated(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or "embd" in name or any(part in name for part in ("embed", "wte", "wpe", "shared.weight"))


def _adapter_bytes(args: ModelArgs) -> tuple[int, bool]:
    """Memory of the adapter, and whether it is only an estimate; PEFT holds halves in fp32."""
    if args.peft is None:
        return 0, False
    adapter = read_adapter(Path(args.peft))
    told = sum(tensor.elements * max(4, TYPE_BITS[tensor.type] // 8) for tensor in adapter.tensors)
    return told + adapter.opaque_bytes, adapter.opaque_bytes > 0


# ---------------------------------------------------------------- configuration


def _read_config(args: ModelArgs) -> dict[str, Any]:
    path = finder(args)("config.json")
    if path is None:
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _load_type(args: ModelArgs, config: dict[str, Any], weights: WeightFiles) -> str:
    """The type that the weights are loaded in: the request's, else the configuration's, else that of the first."""
    if args.dtype != "auto":
        return FLOATS[args.dtype]
    first = next((tensor.type for tensor in weights.tensors if tensor.is_float), "F32")
    return _stated_type(config) or first


def _stated_type(config: dict[str, Any]) -> str | None:
    for part in (config, _text_config(config)):
        stated = part.get("dtype") or part.get("torch_dtype")
        if isinstance(stated, str) and (name := FLOATS.get(stated.removeprefix("torch."))):
            return name
    return None


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a composite configuration that describes the language model."""
    inner = config.get("text_config")
    return cast("dict[str, Any]", inner) if isinstance(inner, dict) else config


def _shape(config: dict[str, Any]) -> Shape:
    text = _text_config(config)
    number = partial(_number, text)
    layers = number("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers")
    layers += number("num_decoder_layers", "decoder_layers")
    query_heads, key_value_heads = _heads(text)
    return Shape(
        layers=layers,
        hidden=number(*_HIDDEN),
        inner=number("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim"),
        experts=max(1, number("num_experts_per_tok")),
        query_heads=query_heads,
        key_value_heads=key_value_heads,
        kept_width=_kept_width_of_all(text, layers),
        vocabulary=number("vocab_size"),
    )


def _number(config: dict[str, Any], *names: str) -> int:
    """The first of these widths that the configuration has; 0 for none."""
    return next((width for name in names if (width := widest(config.get(name))) > 0), 0)


def _heads(config: dict[str, Any]) -> tuple[int, int]:
    """(query heads, heads of keys and values) of a layer."""
    queries = _number(config, "num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads")
    return queries, _number(config, "num_key_value_heads") or queries


def _kept_width_of_all(config: dict[str, Any], layers: int) -> int:
    """Elements of a token's keys and values in all layers, of which some may differ in their heads."""
    usual, own = _kept_width(config), config.get("per_layer_config")
    different = cast("dict[str, Any]", own) if isinstance(own, dict) else {}
    kept = layers * usual  # without a loop: the number is whatever a file says
    for layer, settings in different.items():
        if isinstance(settings, dict) and layer.isdecimal() and int(layer) < layers:
            kept += _kept_width(config | cast("dict[str, Any]", settings)) - usual
    return kept


def _kept_width(config: dict[str, Any]) -> int:
    """Elements of a token's keys and values in a layer with this configuration, at most."""
    number = partial(_number, config)
    query_heads, key_value_heads = _heads(config)
    if number("kv_lora_rank"):  # latent attention: each query head has a key and a value of its own
        return query_heads * (number("qk_nope_head_dim") + number("qk_rope_head_dim") + number("v_head_dim"))
    head_dim = number("head_dim", "d_kv") or number(*_HIDDEN) // max(1, query_heads)
    wide_heads = number("num_global_key_value_heads") or key_value_heads
    return 2 * max(key_value_heads * head_dim, wide_heads * number("global_head_dim"))


def _head_counts(shape: Shape) -> tuple[int, ...]:
    return tuple(sorted({count for count in (shape.query_heads, shape.key_value_heads) if count}))


# ---------------------------------------------------------------- GGUF


def _gguf_size(args: ModelArgs, device: str) -> ReplicaSize | None:
    """Counted as dequantised, which is the most: where transformers can, it keeps blocks as they are."""
    path = finder(msgspec.structs.replace(args, subfolder=None))(str(args.gguf_file))
    if path is None:
        return None
    header = read_gguf_header(path)
    dtype = FLOATS[args.dtype] if args.dtype != "auto" else header.float_type or "F32"
    itemsize = TYPE_BITS[dtype] // 8
    replicated = (
        Tensor(name=name, type=dtype, shape=shape).bytes
        for name, shape in header.shapes.items()
        if _is_replicated(name, shape)
    )
    adapter, estimated = _adapter_bytes(args)
    return ReplicaSize(
        weights_bytes=header.elements * itemsize + adapter,
        replicated_bytes=sum(replicated) + adapter,
        room_bytes=_room(_gguf_shape(header), itemsize, args, device),
        estimated=estimated,
    )


def _gguf_shape(header: GgufHeader) -> Shape:
    architecture = header.metadata.get("general.architecture")

    def number(name: str) -> int:
        return widest(header.metadata.get(f"{architecture}.{name}"))

    hidden, heads = number("embedding_length"), number("attention.head_count")
    key_value_heads = number("attention.head_count_kv") or heads
    key_dim = number("attention.key_length") or hidden // max(1, heads)
    embedding = header.shapes.get("token_embd.weight", ())
    return Shape(
        layers=number("block_count"),
        hidden=hidden,
        inner=number("feed_forward_length"),
        experts=max(1, number("expert_used_count")),
        query_heads=heads,
        key_value_heads=key_value_heads,
        kept_width=number("block_count") * key_value_heads * (key_dim + (number("attention.value_length") or key_dim)),
        vocabulary=embedding[-1] if embedding else 0,
    )
