"""A vision-language checkpoint of SmolVLM-256M's shape with random weights: `python make_smolvlm.py FOLDER`.

Sizes are those of its published configuration: a SigLIP tower of 12 layers over 512 pixels, 64 tokens an image, and
SmolLM2-135M's layers and tokenizer. Nothing that it says means anything; what it costs is what the real one costs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fetch_real_data
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

SIDE, PATCH, SCALE = 512, 16, 4
IMAGE_TOKENS = (SIDE // PATCH) ** 2 // SCALE**2
SPECIAL = {
    "image": "<image>",
    "fake": "<fake_token_around_image>",
    "global": "<global-img>",
    "end": "<end_of_utterance>",
    **{f"row{i}{j}": f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)},
}
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def make_smolvlm(folder: Path) -> None:
    """Write it, fp32, about one GB; images are not split into tiles, so that each costs the same."""
    text = AutoConfig.from_pretrained(fetch_real_data.smollm2())
    tokenizer = AutoTokenizer.from_pretrained(fetch_real_data.smollm2())
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    vision: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    config = AutoConfig.for_model(
        "idefics3",
        text_config=text.to_dict() | {"vocab_size": len(tokenizer)},
        vision_config=vision | {"num_attention_heads": 12, "image_size": SIDE, "patch_size": PATCH},
        image_token_id=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        scale_factor=SCALE,
        tie_word_embeddings=False,
    )
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=TEMPLATE)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).to(torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    make_smolvlm(Path(sys.argv[1]))
