"""Weights of 4 and 8 bits: which of them can be loaded here, and what a request says of them. No torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

from gpu_pool.errors import InvalidRequest
from gpu_pool.records import ModelArgs
from gpu_pool.suggestions import close_names

PACKAGES: dict[str, tuple[str, ...]] = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitnet": (),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "eetq": ("kernels",),
    "fbgemm_fp8": ("fbgemm_gpu",),
    "fouroversix": ("fouroversix",),
    "fp8": (),
    "fp_quant": ("fp_quant",),
    "gemma": (),
    "gguf": ("gguf",),
    "gptq": ("optimum", "gptqmodel"),
    "higgs": ("flute", "fast_hadamard_transform"),
    "hqq": ("hqq",),
    "metal": ("kernels",),
    "mxfp4": (),
    "mxfp8": (),
    "nvfp4": ("kernels",),
    "quanto": ("optimum", "optimum.quanto"),
    "quark": ("quark",),
    "sinq": ("sinq",),
    "spqr": ("spqr_quant",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
"""What a `quant_method` of a checkpoint needs beside our own dependencies, as transformers' quantisers check it."""

_DTYPES = ("float32", "bfloat16", "float16")
_STORAGE_DTYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
_QUANT_TYPES = ("fp4", "nf4")
_EXTRA = "pip install 'evalpool[quantization]'"


def bitsandbytes_options(args: ModelArgs) -> dict[str, Any] | None:
    """The arguments of transformers' BitsAndBytesConfig that `args` ask for; None where they ask for none."""
    if not (args.load_in_8bit or args.load_in_4bit):
        return None
    options = {key: value for key, value in _four_bit_values(args).items() if value not in (None, False)}
    return options | {"load_in_8bit": args.load_in_8bit, "load_in_4bit": args.load_in_4bit}


def check_bitsandbytes(args: ModelArgs) -> None:
    """Raise InvalidRequest unless what `args` ask of bitsandbytes makes sense and can be done here."""
    if args.load_in_8bit and args.load_in_4bit:
        raise InvalidRequest("model_args.load_in_4bit", "cannot be given together with load_in_8bit")
    for key, value in _four_bit_values(args).items():
        if value not in (None, False) and not args.load_in_4bit:
            raise InvalidRequest(f"model_args.{key}", "means something only with load_in_4bit")
    _check_choice("bnb_4bit_compute_dtype", args.bnb_4bit_compute_dtype, _DTYPES)
    _check_choice("bnb_4bit_quant_type", args.bnb_4bit_quant_type, _QUANT_TYPES)
    _check_choice("bnb_4bit_quant_storage", args.bnb_4bit_quant_storage, _STORAGE_DTYPES)
    if not (args.load_in_8bit or args.load_in_4bit):
        return
    key = "load_in_8bit" if args.load_in_8bit else "load_in_4bit"
    if args.gguf_file is not None:
        raise InvalidRequest(
            f"model_args.{key}", "cannot be combined with a GGUF file, which says itself how it is stored"
        )
    if missing := _missing_packages("bitsandbytes"):
        raise InvalidRequest(f"model_args.{key}", f"needs a package that is not installed ({missing}): {_EXTRA}")


def check_quantization(config: dict[str, Any], args: ModelArgs, field: str) -> None:
    """Raise InvalidRequest unless the weights that a checkpoint's config.json describes can be loaded here."""
    quantization = _quantization(config)
    if quantization is None:
        return
    method = _method(quantization)
    if method not in PACKAGES:
        raise InvalidRequest(field, f"its weights are quantised by {method!r}, which transformers does not know")
    for key in ("load_in_8bit", "load_in_4bit"):
        if getattr(args, key):
            raise InvalidRequest(
                f"model_args.{key}", f"leave it out: the weights of the checkpoint are {method} already"
            )
    if missing := _missing_packages(method):
        problem = f"its weights are quantised by {method}, which needs a package that is not installed ({missing})"
        raise InvalidRequest(field, f"{problem}: {_EXTRA}" if method == "bitsandbytes" else problem)


def quantization_method(config: dict[str, Any]) -> str | None:
    """How the weights of a checkpoint with this config.json are quantised; None where they are not."""
    quantization = _quantization(config)
    return None if quantization is None else _method(quantization)


def _four_bit_values(args: ModelArgs) -> dict[str, Any]:
    names = (name for name in ModelArgs.__struct_fields__ if name.startswith("bnb_4bit_"))
    return {name: getattr(args, name) for name in names}


def _check_choice(key: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        problem = f"must be one of {', '.join(choices)}"
        raise InvalidRequest(f"model_args.{key}", problem, choices=close_names(value, choices))


def _quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """transformers looks at the text part of a composite configuration too."""
    for part in (config, config.get("text_config")):
        found = cast("dict[str, Any]", part).get("quantization_config") if isinstance(part, dict) else None
        if isinstance(found, dict):
            return cast("dict[str, Any]", found)
    return None


def _method(quantization: dict[str, Any]) -> str:
    """Older bitsandbytes checkpoints name no method."""
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return "bitsandbytes"
    return str(quantization.get("quant_method"))


def _missing_packages(method: str) -> str:
    """Those of a method's packages that are not installed; a package inside a missing one is not looked for."""
    missing: list[str] = []
    for package in PACKAGES[method]:
        if package.partition(".")[0] in missing or find_spec(package) is None:
            missing.append(package)
    return ", ".join(missing)
