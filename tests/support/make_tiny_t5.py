"""Write a tiny random T5 checkpoint: `python make_tiny_t5.py FOLDER`. Its tokenizer ends every text, as T5's does."""

from __future__ import annotations

import sys

import torch
from make_tiny_model import make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5ForConditionalGeneration


def main(folder: str) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        n_positions=512,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config).to(torch.float32)
    model.lm_head.weight.data *= 0.4  # T5 starts so wide that a perplexity would have fifty digits
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
