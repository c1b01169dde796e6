"""What `model` and `model_args` of a request mean. No torch: it runs in the server."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from gpu_pool import checkpoints
from gpu_pool.checkpoints import check_checkpoint, check_config, check_gguf, check_tokenizer, read_config
from gpu_pool.errors import InvalidRequest
from gpu_pool.model_arguments import DTYPES, decode, in_our_words
from gpu_pool.model_names import MODEL_NAMES, SAME_WEIGHTS, ModelName
from gpu_pool.quantization import check_bitsandbytes, check_quantization
from gpu_pool.records import TEXT_ONLY, Modality, ModelArgs
from gpu_pool.suggestions import close_names
from gpu_pool.weight_files import finder

SPEECH_TASKS = ("transcribe", "translate")
"""Of a speech model."""
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""What some need beside torch; transformers also takes them from the hub, with `kernels`."""
HUB_TIMEOUT_S = 15.0
"""A hub that has not answered by then counts as unreachable; a person waits for the submission."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")
_HUB_KERNEL = re.compile(r"kernels-community/[\w.-]+(@[\w.-]+)?(:\w+)?")
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "*.spm"]


def model_kinds() -> list[str]:
    """Every name that `model` may be, beside a path or hub id; sorted."""
    return list(MODEL_NAMES)


def why_not(name: ModelName, kinds: Collection[str] = ()) -> str | None:
    """Why models of that name cannot run here, where there are endpoints of these `kinds`; None where they can."""
    if name.runs_on == "api" and name.kind not in kinds:
        return f"the operator of this server lists no {name.kind} endpoint (setting endpoints)"
    if name.package is None:
        return name.reason
    if name.runs_on == "engine":
        if find_spec(name.package) is not None:
            return None
        return f"transformers reads its images by the package {name.package} alone, which is not installed"
    there = "is not installed" if find_spec(name.package) is None else "is not driven by evalpool"
    return (
        f"it runs by the package {name.package}, which {there}; its own server speaks OpenAI's protocol, and the "
        "operator can list that as an endpoint"
    )


def located_at(model: str, model_args: dict[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    """`model` and `model_args` of a request, for the same model at another path."""
    if is_kind(model):
        return model, model_args | {"pretrained": path}
    return path, {key: value for key, value in model_args.items() if key != "pretrained"}


def is_kind(model: str) -> bool:
    """Whether `model` names a kind of model, rather than a model."""
    return model in MODEL_NAMES


def resolve_model(
    model: str, model_args: dict[str, Any], *, allow_remote_code: bool, is_merged: bool = True
) -> ModelArgs:
    """The model that a request means, checked as far as local files allow.

    `model` is a kind (then `model_args` has `pretrained`, or the kind a default), or directly a path or hub id. A
    folder that is not `is_merged` need not have weights yet.

    Raises:
        InvalidRequest: naming `model` or `model_args.<key>`.
    """
    values, field = _with_pretrained(model, model_args)
    args = decode(values)
    _check_values(args, allow_remote_code)
    args = _split_gguf_path(args, field)
    check_bitsandbytes(args)
    try:
        _check_files(args, field, is_merged)
    except OSError as error:
        raise InvalidRequest(field, f"{error.filename} cannot be read: {error.strerror}") from error
    if os.path.exists(args.pretrained):
        _check_pixels(args, in_our_words(model_args))
    return args


def resolve_hub_revision(args: ModelArgs) -> ModelArgs:
    """`args` with every hub id pinned: `revision` is a commit, and a tokenizer or adapter a local snapshot folder.

    Asks the hub, or the local cache where the hub cannot be reached; call it in a thread. The adapter and tokenizer
    are taken at `args.revision`, as lm-eval does, and become folders because one revision cannot name two commits.

    Raises:
        InvalidRequest: no such model, or neither the hub nor the cache has it.
    """
    if args.peft and not os.path.exists(args.peft):
        args = msgspec.structs.replace(args, peft=_snapshot(args.peft, args.revision, None, "model_args.peft"))
    if args.tokenizer and not os.path.exists(args.tokenizer):
        folder = _snapshot(args.tokenizer, args.revision, _TOKENIZER_FILES, "model_args.tokenizer")
        args = msgspec.structs.replace(args, tokenizer=folder)
    if os.path.exists(args.pretrained):
        return msgspec.structs.replace(args, revision=None)  # transformers ignores it for a folder
    commit, config = _hub_commit(args)
    if config is not None:
        values = read_config(config, "model")
        check_config(values, "model")
        check_quantization(values, args, "model")
    return msgspec.structs.replace(args, revision=commit)


def local_tokenizer(name: str, field: str) -> str:
    """The folder of a tokenizer of the hub, or its cache; raises InvalidRequest for `field`."""
    _check_hub_id(name, field)
    return _snapshot(name, None, _TOKENIZER_FILES, field)


def modalities(args: ModelArgs) -> frozenset[Modality]:
    """What the model of these resolved arguments takes, as far as its configuration and local files tell."""
    config = None if args.gguf_file else finder(args)("config.json")
    taken = TEXT_ONLY if config is None else checkpoints.modalities(read_config(config, "model"))
    source = args.tokenizer or args.pretrained
    find = finder(msgspec.structs.replace(args, pretrained=source))
    has_processor = not os.path.exists(source) or any(map(find, checkpoints.PROCESSOR_FILES))
    return taken if has_processor else taken & TEXT_ONLY


# ---------------------------------------------------------------- names and values


def _with_pretrained(model: str, model_args: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The model arguments in our words with `pretrained` filled in, and the field that said which model it is."""
    values = in_our_words(model_args)
    if name := MODEL_NAMES.get(model):
        if reason := why_not(name):
            nearest = " or ".join(name.nearest)
            problem = f"{model} cannot run here: {reason}. The nearest that can: {nearest}"
            raise InvalidRequest("model", problem, choices=name.nearest)
        values = _with_defaults(values, name)
        if values.get("pretrained"):
            _check_format(values["pretrained"])
            return values, "model_args.pretrained"
        if name.pretrained is None or "pretrained" in values:
            also = f" ({name.note})" if name.note else ""
            problem = f"a path or hub id is needed for model kind {model!r}{also}"
            raise InvalidRequest("model_args.pretrained", problem)
        return {**values, "pretrained": name.pretrained}, "model"
    if not os.path.exists(model) and not _HUB_ID.fullmatch(model):
        raise _unknown_model(model)
    if values.get("pretrained") not in (None, model):
        raise InvalidRequest(
            "model_args.pretrained", f"must be left out, or be {model!r}: `model` names a model itself"
        )
    return {**values, "pretrained": model}, "model"


def _with_defaults(values: dict[str, Any], name: ModelName) -> dict[str, Any]:
    """With what the name says where the request says nothing; limits of pixels that go with those of the request."""
    values = {**name.defaults, **values}
    least, most = values.get("min_pixels"), values.get("max_pixels")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        return {key: value for key, value in values.items() if value != name.defaults.get(key)}
    return values


def _check_format(pretrained: Any) -> None:
    """Refuse checkpoints of the hub that transformers would take for what they are not."""
    if isinstance(pretrained, str) and (same := SAME_WEIGHTS.get(pretrained)) and not os.path.exists(pretrained):
        problem = f"{pretrained} is in a format that transformers does not load; {same} has the same weights"
        raise InvalidRequest("model_args.pretrained", problem, choices=(same,))


def _unknown_model(model: str) -> InvalidRequest:
    if model.startswith(("/", "./", "../", "~")):
        return InvalidRequest("model", f"{model} does not exist on the server")
    close = close_names(model, model_kinds())
    problem = f"{model!r} is neither a model kind (see GET /models), nor a path on the server, nor a hub id (org/name)"
    return InvalidRequest("model", problem, choices=close)


def _check_values(args: ModelArgs, allow_remote_code: bool) -> None:
    _check_dtype("dtype", args.dtype)
    if args.softmax_dtype is not None:
        _check_dtype("softmax_dtype", args.softmax_dtype)
    if args.attn_implementation is not None:
        _check_attention(args.attn_implementation)
    if args.max_length is not None and args.max_length < 2:
        raise InvalidRequest("model_args.max_length", "must be an integer of at least 2 tokens")
    if args.prefix_token_id is not None and args.prefix_token_id < 0:
        raise InvalidRequest("model_args.prefix_token_id", "must be a token id, 0 or more")
    _check_images(args)
    if args.task not in (None, *SPEECH_TASKS):
        raise InvalidRequest("model_args.task", f"must be one of {', '.join(SPEECH_TASKS)}", choices=SPEECH_TASKS)
    if args.trust_remote_code and not allow_remote_code:
        problem = "refused: the operator has not allowed code that comes with a checkpoint (allow_remote_code)"
        raise InvalidRequest("model_args.trust_remote_code", problem)


def _check_images(args: ModelArgs) -> None:
    sizes = ("min_pixels", "max_pixels", "image_width", "image_height", "image_max_side")
    for key in ("max_images", "num_frames", *sizes):
        if (value := getattr(args, key)) is not None and value < 1:
            raise InvalidRequest(f"model_args.{key}", "must be an integer of at least 1")
    if args.min_pixels and args.max_pixels and args.min_pixels > args.max_pixels:
        raise InvalidRequest("model_args.min_pixels", f"must be at most max_pixels ({args.max_pixels})")
    if args.image_max_side and (args.image_width or args.image_height):
        problem = "must be left out where image_width or image_height says how large images may be"
        raise InvalidRequest("model_args.image_max_side", problem)


def _check_pixels(args: ModelArgs, given: Mapping[str, Any]) -> None:
    """Refuse limits of images that a request gives for a model that is shown none; a kind's own say nothing."""
    limits = [key for key in ("min_pixels", "max_pixels") if given.get(key) is not None]
    if limits and "image" not in modalities(args):
        raise InvalidRequest(f"model_args.{limits[0]}", "must be left out: the model reads no images")


def _check_attention(attention: str) -> None:
    field = "model_args.attn_implementation"
    from_hub = _HUB_KERNEL.fullmatch(attention)
    if attention not in ATTENTION and not from_hub:
        known = f"must be one of {', '.join(ATTENTION)}, or a kernel kernels-community/<name>"
        raise InvalidRequest(field, known, choices=close_names(attention, ATTENTION))
    packages = ["kernels"] if from_hub else ["kernels", ATTENTION_PACKAGES.get(attention, "torch")]
    if not any(find_spec(package) for package in packages):
        problem = f"{attention} needs a package that is not installed ({' or '.join(packages)}); sdpa needs none"
        raise InvalidRequest(field, problem, choices=("sdpa", "eager"))


def _check_dtype(key: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise InvalidRequest(
            f"model_args.{key}", f"must be one of {', '.join(DTYPES)}", choices=close_names(dtype, DTYPES)
        )


# ---------------------------------------------------------------- local files


def _split_gguf_path(args: ModelArgs, field: str) -> ModelArgs:
    if not os.path.isfile(args.pretrained):
        return args
    path = Path(args.pretrained)
    if path.suffix != ".gguf":
        raise InvalidRequest(field, f"{path} is no model: give a model folder or a .gguf file")
    if args.gguf_file not in (None, path.name):
        raise InvalidRequest("model_args.gguf_file", f"must be left out: {field} names a GGUF file itself")
    return msgspec.structs.replace(args, pretrained=str(path.parent), gguf_file=path.name)


def _check_files(args: ModelArgs, field: str, is_merged: bool) -> None:
    if os.path.exists(args.pretrained):
        _check_model_folder(args, Path(args.pretrained), field, is_merged)
    else:
        _check_hub_id(args.pretrained, field)
    if args.peft is not None:
        _check_adapter(args.peft)
    if args.tokenizer is not None:
        if os.path.exists(args.tokenizer):
            check_tokenizer(Path(args.tokenizer), "model_args.tokenizer")
        else:
            _check_hub_id(args.tokenizer, "model_args.tokenizer")


def _check_model_folder(args: ModelArgs, folder: Path, field: str, is_merged: bool) -> None:
    if args.gguf_file is not None:
        if not os.path.isfile(folder / args.gguf_file):
            found = sorted(path.name for path in folder.glob("*.gguf"))
            problem = f"{folder} has no file {args.gguf_file}"
            raise InvalidRequest("model_args.gguf_file", problem, choices=close_names(args.gguf_file, found))
        check_gguf(folder / args.gguf_file, field)
        return  # configuration and tokenizer are inside the file
    if args.subfolder is not None and not os.path.isdir(folder / args.subfolder):
        raise InvalidRequest("model_args.subfolder", f"{folder} has no folder {args.subfolder}")
    inner = folder / (args.subfolder or "")
    check_checkpoint(inner, field, is_merged=is_merged)
    check_quantization(read_config(inner / "config.json", field), args, field)
    if args.tokenizer is None:
        check_tokenizer(inner, field)


def _check_adapter(peft: str) -> None:
    if not os.path.exists(peft):
        _check_hub_id(peft, "model_args.peft")
    elif not os.path.isfile(Path(peft) / "adapter_config.json"):
        raise InvalidRequest("model_args.peft", f"{peft} is no PEFT adapter: it has no adapter_config.json")


def _check_hub_id(name: str, field: str) -> None:
    if not _HUB_ID.fullmatch(name) and not _HUB_NAME.fullmatch(name):
        raise InvalidRequest(field, f"{name} does not exist on the server, and is no hub id (org/name)")


# ---------------------------------------------------------------- the hub


def _hub_commit(args: ModelArgs) -> tuple[str, Path | None]:
    """The commit that `args.revision` is now, and the model's config.json there if it could be had."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    needed = args.gguf_file or "/".join(part for part in (args.subfolder, "config.json") if part)
    try:
        commit = HfApi().model_info(args.pretrained, revision=args.revision, timeout=HUB_TIMEOUT_S).sha or "main"
        if args.gguf_file is not None:
            return commit, None
        return commit, Path(hf_hub_download(args.pretrained, needed, revision=commit))
    except RevisionNotFoundError as error:
        raise InvalidRequest("model_args.revision", f"{args.pretrained} has no revision {args.revision!r}") from error
    except RepositoryNotFoundError as error:
        problem = f"{args.pretrained} is neither a path on the server nor a model of the hub (or it is private)"
        raise InvalidRequest("model", problem) from error
    except Exception as error:  # offline, no route, time limit, refused: many classes, one meaning
        cached = try_to_load_from_cache(args.pretrained, needed, revision=args.revision)
        if isinstance(cached, str):
            return _snapshot_commit(Path(cached)), Path(cached) if args.gguf_file is None else None
        raise _hub_unreachable("model", args.pretrained) from error


def _snapshot_commit(cached: Path) -> str:
    """The commit in a cache path .../snapshots/<commit>/<file>."""
    parts = cached.parts
    return parts[len(parts) - parts[::-1].index("snapshots")]


def _snapshot(name: str, revision: str | None, patterns: list[str] | None, field: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT_S)
    except Exception as error:  # as above; the cache was already tried
        raise _hub_unreachable(field, name) from error


def _hub_unreachable(field: str, name: str) -> InvalidRequest:
    problem = f"{name} is no path on the server, and the hub cannot be reached from it; give a path to a local copy"
    return InvalidRequest(field, problem)
