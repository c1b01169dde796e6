"""What a completions endpoint answers that serves a small model: computed by transformers, one request at a time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Json = dict[str, Any]


class TinyCompletions:
    """Answers bodies of /completions whose prompt is one list of tokens, or a list of one such list."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._lock = threading.Lock()

    def __call__(self, body: Json) -> Json:
        """The first choice."""
        prompt = body["prompt"]
        tokens = torch.tensor(prompt if isinstance(prompt[0], list) else [prompt])
        with self._lock, torch.inference_mode():
            return self._scores(tokens) if body.get("echo") else self._text(tokens, body)

    def _scores(self, tokens: torch.Tensor) -> Json:
        logprobs = self._model(tokens).logits[0].log_softmax(-1)
        following = torch.cat([tokens[0, 1:], logprobs[-1:].argmax(-1)])
        said = logprobs.gather(1, following[:, None])[:, 0].tolist()
        best = logprobs.max(-1)
        tops = [{str(i): v} for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        return {"text": "", "logprobs": {"token_logprobs": [None, *said], "top_logprobs": [None, *tops]}}

    def _text(self, tokens: torch.Tensor, body: Json) -> Json:
        made = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=body["max_tokens"],
            do_sample=False,
            stop_strings=body.get("stop") or None,
            tokenizer=self._tokenizer,
        )
        text = self._tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)
        for stop in body.get("stop", ()):
            text = text.split(stop)[0]
        return {"text": text}
