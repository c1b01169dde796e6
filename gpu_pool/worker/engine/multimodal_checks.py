# pyright: basic
"""What prompts with media may share without changing each other's answers: the loaded model is asked, with two of them.

A family of models may mix padding into its positions, count images in a state of its own, or read its cache otherwise
than it was written. What does not come out as it does alone is computed alone.
"""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from gpu_pool.chunk_messages import MediaPrompt
from gpu_pool.worker.engine.company import Company, are_equal
from gpu_pool.worker.engine.multimodal_scoring import shared_logits
from gpu_pool.worker.engine.prompt_inputs import PromptInputs, collate

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

_SIDE = 64
"""Pixels of the images' sides."""
_RATE, _SECONDS = 16_000, 0.5
"""Of the sounds."""
_QUESTIONS = ("What is this?", "What is this?", "What is this, and what else can be seen in the picture?")
"""Two of equal length in any tokenizer, one longer; each of another image or sound."""
_NEW = 4
"""New tokens that are compared."""


@dataclass(frozen=True)
class MediaFacts:
    """What was found."""

    company: Company
    """Which prompts may be continued together."""
    shares_prompts: bool
    """Whether a prompt's keys and values serve all continuations that are scored after it."""
    problem: str = ""
    """What went wrong when it was asked."""

    def __str__(self) -> str:
        shared = "read once for all choices" if self.shares_prompts else "read again for each choice"
        problem = f" ({self.problem})" if self.problem else ""
        return f"prompts of {self.company.value} share batches, each {shared}{problem}"


def check_media(loaded: LoadedModel) -> MediaFacts:
    """Ask the model, on images or sounds and the questions above; what holds for both where it takes both."""
    assert loaded.processor is not None
    takes = {"image": loaded.processor.sees, "audio": loaded.processor.hears}
    facts = [_check(loaded, kind) for kind in takes if takes[kind]]
    least = max(facts, key=lambda fact: list(Company).index(fact.company))
    problems = "; ".join(dict.fromkeys(fact.problem for fact in facts if fact.problem))
    return MediaFacts(least.company, all(fact.shares_prompts for fact in facts), problems)


def _check(loaded: LoadedModel, kind: str) -> MediaFacts:
    try:
        prompts = _prompts(loaded, kind)
        company = _company(loaded, prompts)
    except Exception as error:  # processors and a checkpoint's own code raise whatever they like
        return MediaFacts(Company.NONE, False, f"{type(error).__name__}: {error}")
    if loaded.transcribes:
        return MediaFacts(company, False)
    try:
        return MediaFacts(company, _shares(loaded, prompts[: 1 if company is Company.NONE else 2]))
    except Exception as error:
        return MediaFacts(company, False, f"{type(error).__name__}: {error}")


def _prompts(loaded: LoadedModel, kind: str) -> list[PromptInputs]:
    assert loaded.processor is not None
    processor = loaded.processor
    make = _image_file if kind == "image" else _sound_file
    files = {str(seed): make(seed) for seed in range(len(_QUESTIONS))}
    prompts: list[PromptInputs] = []
    for question, digest in zip(_QUESTIONS, files, strict=True):
        text = "" if loaded.transcribes else render(processor.processor, question, kind)
        of_kind = {"image": MediaPrompt(text=text, media=(digest,)), "audio": MediaPrompt(text=text, audio=(digest,))}
        prompts.append(processor.prepare(of_kind[kind], files))
    return prompts


def _sound_file(seed: int) -> bytes:
    """Noise of 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, _RATE, 0, "NONE", ""))
        written.writeframes(hashlib.shake_256(bytes([seed])).digest(2 * int(_RATE * _SECONDS)))
    return file.getvalue()


def _image_file(seed: int) -> bytes:
    noise = hashlib.shake_256(bytes([seed])).digest(3 * _SIDE * _SIDE)
    file = io.BytesIO()
    Image.frombytes("RGB", (_SIDE, _SIDE), noise).save(file, "PNG")
    return file.getvalue()


def render(processor: Any, question: str, kind: str = "image") -> str:
    """A prompt with one image or sound, by the chat template if there is one."""
    if getattr(processor, "chat_template", None) is not None:
        content = [{"type": kind}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    names = ("image_token", "boi_token") if kind == "image" else (f"{kind}_token",)  # the first that it has
    known = [token for name in names if (token := getattr(processor, name, None))]
    return f"{[*known, f'<{kind}>'][0]}{question}"


@torch.inference_mode()
def _company(loaded: LoadedModel, prompts: Sequence[PromptInputs]) -> Company:
    """As `company.probe_company` asks models of text: the first prompt alone, and beside one of the others.

    The second new token's logits are compared: past the prompt, to probe the cache too.
    """
    first, second, longer = prompts
    alone = _generate(loaded, [first], 2).logits[1][0]
    for company, other in ((Company.ANY_LENGTH, longer), (Company.EQUAL_LENGTH, second)):
        if other.kind != first.kind:
            continue
        if are_equal(alone, _generate(loaded, [first, other], 2).logits[1][0], loaded.model.dtype):
            return company
    return Company.NONE


@torch.inference_mode()
def _shares(loaded: LoadedModel, prompts: Sequence[PromptInputs]) -> bool:
    """Whether shared keys and values give the logits that generation gives, token by token.

    That is what a continuation's log-probability means; a forward pass over prompt and continuation may say otherwise,
    where a prompt's tokens look at all of it, before them and behind (PaliGemma).
    """
    generated = [_generate(loaded, [prompt], _NEW) for prompt in prompts]
    texts = [tuple(output.sequences[0, -_NEW:].tolist()) for output in generated]
    reads = [tokens[:end] for tokens in texts for end in (_NEW - 1, 1)]
    first, others = shared_logits(loaded, prompts, reads)
    assert others is not None
    for number, output in enumerate(generated):
        expected = torch.cat(output.logits)
        long, short = others[2 * number], others[2 * number + 1]
        for shared in (torch.cat([first[number][None], long]), torch.cat([first[number][None], short[:1]])):
            if not are_equal(shared, expected[: len(shared)], loaded.model.dtype):
                return False
    return True


def _generate(loaded: LoadedModel, prompts: Sequence[PromptInputs], count: int) -> Any:
    """So many new tokens of each prompt, the most likely ones, with their logits."""
    return loaded.model.generate(
        **collate(prompts, loaded.device, loaded.model.dtype),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
