# pyright: basic
"""The tokenizer of a model, loaded as lm-eval's HF backend does."""

from __future__ import annotations

from typing import Any

import transformers

from gpu_pool.records import ModelArgs


def load_tokenizer(args: ModelArgs, *, trust_remote_code: bool) -> Any:
    """The tokenizer named by `args` (a GGUF file brings its own), able to pad.

    Raises:
        OSError, ValueError: whatever transformers says of one that it cannot load.
    """
    options: dict[str, Any] = {"revision": args.revision or "main", "trust_remote_code": trust_remote_code}
    if args.gguf_file and not args.tokenizer:
        options["gguf_file"] = args.gguf_file
    else:
        options["use_fast"] = args.use_fast_tokenizer
    if args.add_bos_token is not None:
        options["add_bos_token"] = args.add_bos_token
    if args.subfolder:
        options["subfolder"] = args.subfolder
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer or args.pretrained, **options)
    _ensure_pad_token(tokenizer)
    return tokenizer


def _ensure_pad_token(tokenizer: Any) -> None:
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.unk_token:
        tokenizer.pad_token_id = tokenizer.unk_token_id
    elif tokenizer.eos_token:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
