"""Text to tokens, exactly as lm-eval's HF backend does it."""

# pyright: basic
from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from lm_eval.models.utils import configure_pad_token, resolve_max_length
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.utils.hub import cached_file

from gpu_pool import checkpoints
from gpu_pool.errors import PoolError
from gpu_pool.evaluator.failures import ContentChanged, explain
from gpu_pool.evaluator.placeholders import image_placeholder
from gpu_pool.evaluator.tokenising import TextEncoder, Tokeniser, Tokens
from gpu_pool.evaluator.typed_content import MediaPlaces
from gpu_pool.fingerprint import deserves_another_look, is_current
from gpu_pool.records import TEXT_ONLY, Modality, ModelArgs, ModelSpec

_WARM_TOKENIZERS = 4

_log = logging.getLogger(__name__)


class PromptError(PoolError):
    """A prompt cannot be rendered or tokenised for this model."""


class PromptEncoder:
    """Tokenizer, chat template and length of one model. Sources named below are `lm_eval.models.huggingface.HFLM`'s."""

    sends_text = False
    """Whether prompts go to the model as text, rather than as tokens."""

    def __init__(self, args: ModelArgs, config: Any = None) -> None:
        """`config` is the model's configuration; None: it is where the model is."""
        self._args = args
        source = args.tokenizer or args.pretrained
        try:
            config = _load_config(args) if config is None else config
            self.tokenizer: Any = configure_pad_token(_load_tokenizer(args), model_config=config)
        except Exception as error:  # transformers raises whatever its parsers do
            raise PromptError(f"the tokenizer of {source} cannot be loaded: {explain(error)}") from error
        self.is_encoder_decoder: bool = getattr(config, "model_type", None) in checkpoints.ENCODER_DECODER_TYPES
        self.max_length: int = args.max_length or resolve_max_length(config, self.tokenizer)
        self.prefix_token_id = _prefix_token_id(args, self.tokenizer)
        self._prefix: Tokens = np.array([self.prefix_token_id], np.uint32)
        tokeniser = Tokeniser(self.tokenizer)
        special = {} if args.add_bos_token is None else {"add_special_tokens": args.add_bos_token}
        self._texts = TextEncoder(tokeniser, special, self.tokenizer.decode(self.prefix_token_id))
        self._continuations = TextEncoder(tokeniser, {"add_special_tokens": False})
        prompt_special, bos = special, getattr(self.tokenizer, "bos_token", None)
        if self.is_encoder_decoder:  # whose prompts lm-eval gives to the tokenizer as they are
            prompt_special, bos = {}, None
        self._prompts = TextEncoder(tokeniser, prompt_special | {"truncation": args.truncation}, bos)
        taken = checkpoints.modalities(config.to_dict())
        self.modalities: frozenset[Modality] = taken if _has_processor(args) else taken & TEXT_ONLY
        self.transcribes = "text" not in taken
        self._takes_media = bool(self.modalities - TEXT_ONLY)
        if self._takes_media and (template := _processor_template(args)) is not None:
            self.tokenizer.chat_template = template
        self.max_images = args.max_images
        self.num_frames = args.num_frames
        self._places = MediaPlaces(
            kinds=self.modalities,
            interleave=args.interleave,
            max_images=args.max_images,
            num_frames=args.num_frames,
        )
        self._image_string = _image_string(args, config, self.tokenizer)
        self._audio_string = _audio_string(args, config, self.tokenizer)
        self._template_args = dict(args.chat_template_args or {})
        if args.enable_thinking is not None:
            self._template_args["enable_thinking"] = args.enable_thinking

    @property
    def end_of_text(self) -> str | None:
        """The end token as a stop string (`generate_until`)."""
        end = self.tokenizer.eos_token_id
        return None if end is None else self.tokenizer.decode(end, skip_special_tokens=False)

    def encode(self, strings: Iterable[str]) -> dict[str, Tokens]:
        """Tokens of each distinct string (`tok_encode`)."""
        return self._texts.encode(strings)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """(context, continuation) tokens of each pair of strings (`TemplateLM.loglikelihood`, `_encode_pair`)."""
        if self.is_encoder_decoder:
            return self._encode_separately(pairs)
        split = [_move_spaces(*pair) if pair[0] else pair for pair in pairs]
        tokens = self._texts.extend(after for (context, _), after in zip(pairs, split, strict=True) if context)
        bare = self._continuations.encode(continuation for context, continuation in pairs if not context)
        return [
            tokens[after] if context else self._after_prefix(bare[continuation])
            for (context, continuation), after in zip(pairs, split, strict=True)
        ]

    def why_unscorable(self, context: Tokens, continuation: Tokens) -> str | None:
        """Why the model cannot score `continuation`, if it cannot (`_loglikelihood_tokens`)."""
        if not len(context) or not len(continuation):
            return "A context or continuation has no tokens: there is nothing to score"
        if len(continuation) > self.max_length:
            return (
                f"A continuation of {len(continuation)} tokens is longer than the model's maximum ({self.max_length})"
            )
        return None

    def seen_context(self, context: Tokens, continuation: Tokens) -> Tokens:
        """What the model can see of `context` before `continuation`: its end (`_loglikelihood_tokens`)."""
        own = 0 if self.is_encoder_decoder else len(continuation) - 1  # its last token is not read
        return context[max(0, len(context) + own - self.max_length) :]

    def encode_prompts(self, prompts: Iterable[str], room: int) -> dict[str, Tokens]:
        """Tokens of prompts that leave `room` tokens to generate, cut from the left (`tok_batch_encode`).

        An encoder takes a prompt of any `room`, with the tokenizer's own special tokens whatever the request says.
        """
        longest = self.max_length if self.is_encoder_decoder else self.max_length - room
        if longest <= 0:
            raise PromptError(
                f"max_gen_toks ({room}) must be less than the model's maximum sequence length ({self.max_length})"
            )
        tokens = self._prompts.encode(prompts)
        cut = sum(len(prompt) > longest for prompt in tokens.values())
        if cut:
            _log.warning("%d prompts are longer than %d tokens: their beginning is left out", cut, longest)
        return {prompt: ids[-longest:] for prompt, ids in tokens.items()}

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has one at all."""
        return self.tokenizer.chat_template is not None

    def chat_template(self, wanted: bool | str | None) -> str | None:
        """The template that `apply_chat_template: wanted` uses (`TemplateLM.chat_template`)."""
        template = self.tokenizer.chat_template
        if not isinstance(template, dict):
            return template
        name = wanted if isinstance(wanted, str) else "default"
        if name not in template:
            raise PromptError(f"The model has no chat template {name!r}; it has: {', '.join(sorted(template))}")
        return template[name]

    def apply_chat_template(
        self,
        wanted: bool | str,
        history: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        *,
        keep_system: bool = False,
    ) -> str:
        """One conversation as a prompt; without its system turn if the template refuses that, and it need not be kept.

        For a model that takes media, contents are lists of typed parts, as `hf-multimodal` makes them.

        Raises:
            PromptError: a system turn that must be kept is refused.
        """
        if self._takes_media:
            contents = self._places.conversation([turn["content"] for turn in history])
            history = [{**turn, "content": content} for turn, content in zip(history, contents, strict=True)]
        render = functools.partial(
            self.tokenizer.apply_chat_template,
            chat_template=self.chat_template(wanted),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_args,
        )
        try:
            return render(history)
        except jinja2.exceptions.TemplateError:
            bare = render([turn for turn in history if turn["role"] != "system"])  # raises what else is refused
            if keep_system:
                raise PromptError("system_instruction: the model's chat template takes no system turn") from None
            _log.warning("The chat template takes no system turn: it is left out")
            return bare

    def place_media(self, prompt: str) -> str:
        """A prompt without a chat template, which knows it: the model's own strings where media belong.

        Raises:
            PromptError: nobody knows what such a string is.
        """
        try:
            return self._places.with_strings(prompt, self._image_string, self._audio_string)
        except LookupError as error:
            [kind] = error.args
            raise PromptError(
                f"Its configuration names no token for {kind}: give {kind}_string in model_args"
            ) from None

    def description(self) -> dict[str, Any]:
        """lm-eval's tokenizer entries of a results file (`add_tokenizer_info`)."""
        tokenizer = self.tokenizer
        return {
            "tokenizer_pad_token": [tokenizer.pad_token, str(tokenizer.pad_token_id)],
            "tokenizer_eos_token": [tokenizer.eos_token, str(tokenizer.eos_token_id)],
            "tokenizer_bos_token": [tokenizer.bos_token, str(tokenizer.bos_token_id)],
            "eot_token_id": tokenizer.eos_token_id,
            "max_length": self.max_length,
        }

    def _encode_separately(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """An encoder's context and a decoder's continuation share no string (`_encode_pair`)."""
        split = [_move_spaces(*pair) if pair[0] else pair for pair in pairs]
        contexts = self.encode(context for (given, _), (context, _) in zip(pairs, split, strict=True) if given)
        bare = self._continuations.encode(continuation for _, continuation in split)
        return [
            (contexts[context], bare[after]) if given else self._after_prefix(bare[after])
            for (given, _), (context, after) in zip(pairs, split, strict=True)
        ]

    def _after_prefix(self, continuation: Tokens) -> tuple[Tokens, Tokens]:
        if np.array_equal(continuation[:1], self._prefix):
            return continuation[:1], continuation[1:]
        return self._prefix, continuation


class EncoderPool:
    """Encoders kept warm between jobs, by the model's content and arguments."""

    def __init__(self, fingerprint_memo: Path) -> None:
        self._memo = fingerprint_memo
        self._encoders: dict[str, PromptEncoder] = {}

    def get(self, model: ModelSpec) -> tuple[PromptEncoder, bool]:
        """The model's encoder, loaded if need be, and whether it is of the content that `model` means.

        It is not when the files have changed since the job was submitted. The least recently used one makes room.

        Raises:
            PromptError: it cannot be loaded; ContentChanged where that may be for files that are being written.
        """
        encoder = self._encoders.pop(model.replica_key, None)
        if encoder is None:
            try:
                encoder = PromptEncoder(model.args)
            except PromptError as error:
                if deserves_another_look(model, self._memo):
                    raise ContentChanged(f"{error}; its files have changed or are being written") from error
                raise
            if not is_current(model, self._memo):  # after loading: whatever was written before or meanwhile shows
                return encoder, False
        self._encoders[model.replica_key] = encoder
        if len(self._encoders) > _WARM_TOKENIZERS:
            del self._encoders[next(iter(self._encoders))]
        return encoder, True


def import_model_code() -> None:
    """Import now what transformers imports when it reads the first configuration of any model (seconds)."""
    LlamaConfig()


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """(context without trailing spaces, continuation after them)."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _load_tokenizer(args: ModelArgs) -> Any:
    """HFLM's `_create_tokenizer`."""
    options: dict[str, Any] = _source_options(args)
    if args.tokenizer is None and args.gguf_file is not None:
        options["gguf_file"] = args.gguf_file
    else:
        options["use_fast"] = args.use_fast_tokenizer
    if args.add_bos_token is not None:
        options["add_bos_token"] = args.add_bos_token
    return AutoTokenizer.from_pretrained(args.tokenizer or args.pretrained, **options)


def _load_config(args: ModelArgs) -> Any:
    """HFLM's `_get_config`."""
    gguf = {} if args.gguf_file is None else {"gguf_file": args.gguf_file}
    return AutoConfig.from_pretrained(args.pretrained, **_source_options(args), **gguf)


def _source_options(args: ModelArgs) -> dict[str, Any]:
    options: dict[str, Any] = {"revision": args.revision or "main", "trust_remote_code": args.trust_remote_code}
    return options | {"subfolder": args.subfolder} if args.subfolder else options


def _image_string(args: ModelArgs, config: Any, tokenizer: Any) -> str | None:
    """What stands for an image in a prompt without a chat template (`HFMultimodalLM.__init__`).

    Some processors look for the token that begins an image, not for the one that `image_token_id` means.
    """
    if args.image_string is not None:
        return args.image_string
    begin: str | None = getattr(tokenizer, "boi_token", None) if args.image_token_id is None else None
    if begin and (found := image_placeholder(config.model_type, tokenizer)):
        return found
    candidates = (args.image_token_id, *(getattr(config, f"image_token_{name}", None) for name in ("id", "index")))
    token_id = next((candidate for candidate in candidates if candidate is not None), None)
    return begin if token_id is None else tokenizer.decode([token_id], skip_special_tokens=False)


def _audio_string(args: ModelArgs, config: Any, tokenizer: Any) -> str | None:
    """What stands for a sound in a prompt without a chat template; Qwen's is enclosed (`HFAUDIOLMQWEN`)."""
    if args.audio_string is not None:
        return args.audio_string
    candidates = (getattr(config, f"audio_token_{name}", None) for name in ("id", "index"))
    token_id = next((candidate for candidate in candidates if candidate is not None), None)
    if token_id is None:
        return None
    token = tokenizer.decode([token_id], skip_special_tokens=False)
    vocabulary = tokenizer.get_vocab()
    begin, end = (name if name in vocabulary else "" for name in ("<|audio_bos|>", "<|audio_eos|>"))
    return begin + token + end


def _has_processor(args: ModelArgs) -> bool:
    return any(_find(args, name) is not None for name in checkpoints.PROCESSOR_FILES)


def _processor_template(args: ModelArgs) -> Any:
    """The chat template of a processor that keeps it in a file of its own, as older checkpoints do."""
    path = _find(args, "chat_template.json")
    return None if path is None or _find(args, "chat_template.jinja") else json.loads(path.read_text())["chat_template"]


def _find(args: ModelArgs, name: str) -> Path | None:
    """A file of the tokenizer's and processor's folder or repository, if it has it."""
    source = args.tokenizer or args.pretrained
    found = cached_file(
        source,
        name,
        revision=args.revision or "main",
        subfolder=args.subfolder or "",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _prefix_token_id(args: ModelArgs, tokenizer: Any) -> int:
    """HFLM's `prefix_token_id`."""
    for candidate in (args.prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return candidate
    raise PromptError("The tokenizer has neither a beginning nor an end token: give model_args.prefix_token_id")
