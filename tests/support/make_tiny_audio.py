"""Write a tiny random checkpoint that hears, always the same: `python make_tiny_audio.py FAMILY FOLDER`.

They hear SECONDS at once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from make_tiny_model import make_tokenizer
from make_tiny_vlm import TEXT
from transformers import AutoConfig

SECONDS = 2
RATE = 16_000
MELS = 16
POSITIONS = 50 * SECONDS
"""Of the encoder: 20 ms each."""
LANGUAGES = ("<|en|>", "<|de|>", "<|fr|>")
TASKS = {"transcribe": "<|transcribe|>", "translate": "<|translate|>"}
ENCODER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "num_mel_bins": MELS,
    "max_source_positions": POSITIONS,
    "init_std": 0.3,  # wide enough that answers differ from each other
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def make(family: str) -> tuple[Any, Any]:
    """The model and its processor."""
    torch.manual_seed(0)
    return {"whisper": _whisper, "qwen2_audio": _qwen2_audio}[family]()


def _features() -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=MELS, sampling_rate=RATE, chunk_length=SECONDS)


def _whisper() -> tuple[Any, Any]:
    model = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    tokenizer = transformers.WhisperTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    names = ["<|startoftranscript|>", *LANGUAGES, *TASKS.values(), "<|startofprev|>", "<|nospeech|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*names, "<|notimestamps|>"]})
    tokenizer.add_tokens([f"<|{place * 0.02:.2f}|>" for place in range(POSITIONS + 1)])
    of = tokenizer.convert_tokens_to_ids
    ends = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": of("<|startoftranscript|>"),
    }
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_target_positions=64,
        **ENCODER,
        **ends,
    )
    model = transformers.WhisperForConditionalGeneration(config).to(torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(
        **ends,
        is_multilingual=True,
        lang_to_id={name: of(name) for name in LANGUAGES},
        task_to_id={name: of(token) for name, token in TASKS.items()},
        no_timestamps_token_id=of("<|notimestamps|>"),
        prev_sot_token_id=of("<|startofprev|>"),
        max_initial_timestamp_index=50,
        max_length=64,
        suppress_tokens=[of(name) for name in names],
        return_timestamps=False,
    )
    return model, transformers.WhisperProcessor(_features(), tokenizer)


def _qwen2_audio() -> tuple[Any, Any]:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(
        "qwen2_audio",
        audio_config=ENCODER,
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer), **ids},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        tie_word_embeddings=False,
        **ids,
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config).to(torch.float32).eval()
    for name, weight in model.named_parameters():  # towers forget their ranges: then all would sound the same
        if weight.ndim > 1 and "language_model" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model, transformers.Qwen2AudioProcessor(_features(), tokenizer, chat_template=TEMPLATE)


def main(family: str, folder: str) -> None:
    model, processor = make(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
