"""From `model_args` as lm-eval or lmms-eval document them to ours."""

from __future__ import annotations

from typing import Any

import msgspec

from gpu_pool.errors import InvalidRequest
from gpu_pool.model_names import FLAGS, MEANINGLESS, MEANINGLESS_VALUES, RENAMED
from gpu_pool.records import ModelArgs
from gpu_pool.suggestions import close_names

DTYPES = {
    **{name: name for name in ("auto", "float32", "bfloat16", "float16", "float64")},
    **{"float": "float32", "half": "float16", "double": "float64"},
}
"""Accepted dtypes, and torch's own name of each."""

_OWN_FIELDS = {
    "batch_size": "give `batch_size` beside `model_args`",
    "max_batch_size": 'give `batch_size` beside `model_args` (an integer or "auto")',
    "device": "give `device` beside `model_args`",
    "device_map": "the pool places models; give `num_gpus` beside `model_args`",
    "parallelize": "the pool places models; give `num_gpus` beside `model_args`",
    "gen_kwargs": "give `gen_kwargs` beside `model_args`",
    "max_new_tokens": "give `max_gen_toks` in `gen_kwargs` beside `model_args`",
    "temperature": "give `temperature` in `gen_kwargs` beside `model_args`",
    "system_prompt": "give `system_instruction` beside `model_args`",
    "reasoning_prompt": "what follows each question is the task's: write it into one of your own (post_prompt)",
    **dict.fromkeys(
        ("mm_spatial_pool_mode", "mm_spatial_pool_stride"),
        "images are pooled as the checkpoint's class does; leave it out",
    ),
    "token_strategy": "each frame of a video has a placeholder of its own; leave it out",
    "chat_template": "the checkpoint has it; `apply_chat_template` beside `model_args` chooses one by its name",
    "backend": "the checkpoint says whether it is an encoder-decoder; leave it out",
    **dict.fromkeys(
        ("api_key", "auth_token", "base_url", "endpoint", "header", "num_concurrent"),
        'it is for models behind an endpoint, such as `"model": "openai"` (see GET /models)',
    ),
}
"""Keys that other harnesses take here, and where they belong."""


_OF_VIDEOS = "a video is shown as num_frames images, however long it is"


def decode(values: dict[str, Any]) -> ModelArgs:
    """The arguments of a model that our engine loads, with one spelling for each dtype.

    Raises:
        InvalidRequest: naming `model_args.<key>`.
    """
    known = ModelArgs.__struct_fields__
    ours = in_our_words(values)
    for key in ours:
        if key not in known:
            reason = _OWN_FIELDS.get(key, f"unknown; known are {', '.join(sorted(known))}")
            raise InvalidRequest(f"model_args.{key}", reason, choices=close_names(key, known))
    try:
        args = msgspec.convert(ours, ModelArgs, strict=True)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        key = path.rstrip("`")
        raise InvalidRequest(f"model_args.{key}" if key else "model_args", problem.replace("`", "")) from error
    keys = ("dtype", "softmax_dtype", "bnb_4bit_compute_dtype")
    given = {key: name for key in keys if (name := getattr(args, key)) is not None}
    return msgspec.structs.replace(args, **{key: DTYPES.get(name, name) for key, name in given.items()})


def in_our_words(values: dict[str, Any]) -> dict[str, Any]:
    """`model_args` with the names that we have for them, without those that mean nothing here.

    Raises:
        InvalidRequest: two of them are one here, or a flag is neither true nor false.
    """
    known = ModelArgs.__struct_fields__
    ours: dict[str, Any] = {}
    for key, value in values.items():
        name = key
        if key in FLAGS:
            name, meaning = FLAGS[key]
            if not isinstance(value, bool):
                raise InvalidRequest(f"model_args.{key}", "must be true or false")
            if not value:
                continue
            value = meaning
        elif key not in known and key in RENAMED:
            name = RENAMED[key]
            if name not in known:
                continue
        elif key not in known and key in MEANINGLESS and value in (MEANINGLESS_VALUES.get(key) or (value,)):
            continue
        if name in ours and ours[name] != value:
            raise InvalidRequest(f"model_args.{key}", f"is {name} here, which the request gives another value")
        ours[name] = value
    return ours


def known_arguments() -> dict[str, tuple[str | None, str | None]]:
    """Every name that is accepted -> which argument it is here (None: it means nothing), and a remark."""
    ours = ModelArgs.__struct_fields__
    flags = {name: (target, f"true: {meaning}") for name, (target, meaning) in FLAGS.items()}
    nothing = {name: (None, why) for name, why in MEANINGLESS.items()}
    renamed = {name: (target, None) if target in ours else (None, _OF_VIDEOS) for name, target in RENAMED.items()}
    return {**nothing, **renamed, **flags, **{name: (name, None) for name in ours}}
