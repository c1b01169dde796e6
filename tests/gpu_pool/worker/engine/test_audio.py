"""Prompts with sounds through the engine: its texts are those of transformers' generate, one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fresh_models import load_fresh
from sounds import RATE, tone, wav

from gpu_pool.chunk_messages import (
    GenerationOptions,
    MediaGenerationChunk,
    MediaLoglikelihoodChunk,
    MediaPrompt,
)
from gpu_pool.token_sequences import TokenSequences
from gpu_pool.worker.engine import multimodal_generation, multimodal_scoring
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.media_chunks import MediaChunk
from gpu_pool.worker.engine.multimodal_checks import MediaFacts
from gpu_pool.worker.engine.preparation import Preparation

LENGTHS = (0.3, 1.0, 1.7, 2.0, 0.9)
SOUNDS = [tone(seconds, seed) for seed, seconds in enumerate(LENGTHS)]
FILES = {hashlib.sha256(wav(sound)).hexdigest(): wav(sound) for sound in SOUNDS}
DIGESTS = tuple(FILES)
QUESTIONS = ("What is this?", "Which sound can be heard here, and what is it of?")
NEW = 8


def samples(sound: np.ndarray) -> np.ndarray:
    """As a decoder has them."""
    return sound.astype(np.float32) / 32768


def generate(
    loaded: LoadedModel, prompts: Sequence[MediaPrompt], batch_size: int | None = None, **options: Any
) -> tuple[dict[int, str], dict[int, str]]:
    chosen = GenerationOptions(**({"max_gen_toks": NEW} | options))
    asked = MediaGenerationChunk(chunk_id=1, prompts=tuple(prompts), options=chosen, batch_size=batch_size)
    chunk = MediaChunk(asked, Preparation(loaded.prepare).plan(asked.prompts, FILES))
    return multimodal_generation.generate(loaded, chunk, lambda: False)


class TestWhisper:
    """Speech to text."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tiny_audio: Callable[[str], Path]) -> Path:
        return tiny_audio("whisper")

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, folder: Path) -> LoadedModel:
        return load_fresh(folder, dtype="float32")

    @pytest.fixture(scope="class")
    @classmethod
    def prompts(cls) -> list[MediaPrompt]:
        return [MediaPrompt(text="", audio=(digest,)) for digest in DIGESTS]

    @staticmethod
    def written(loaded: LoadedModel, sound: np.ndarray, **options: Any) -> str:
        """By transformers, alone."""
        assert loaded.processor is not None
        processor = loaded.processor.processor
        long = {"truncation": False, "padding": "longest", "return_attention_mask": True}
        is_long = len(sound) > 2 * RATE
        inputs = processor(samples(sound), sampling_rate=RATE, return_tensors="pt", **(long if is_long else {}))
        output = loaded.model.generate(
            **inputs, max_new_tokens=NEW, num_beams=1, **({"return_timestamps": True} if is_long else {}), **options
        )
        return processor.batch_decode(output, skip_special_tokens=True)[0]

    def test_sounds_share_batches(self, loaded: LoadedModel) -> None:
        assert loaded.media == MediaFacts(Company.ANY_LENGTH, shares_prompts=False)

    @pytest.mark.parametrize("batch_size", [1, 3, None])
    def test_texts_are_those_of_transformers(
        self, loaded: LoadedModel, prompts: list[MediaPrompt], batch_size: int | None
    ) -> None:
        expected = {number: self.written(loaded, sound) for number, sound in enumerate(SOUNDS)}
        assert len(set(expected.values())) > 1
        assert generate(loaded, prompts, batch_size) == (expected, {})

    @pytest.mark.parametrize("speech", [{"language": "de"}, {"language": "fr", "task": "translate"}])
    def test_language_and_task(self, folder: Path, prompts: list[MediaPrompt], speech: dict[str, str]) -> None:
        loaded = load_fresh(folder, dtype="float32", **speech)
        expected = {number: self.written(loaded, sound, **speech) for number, sound in enumerate(SOUNDS)}
        assert generate(loaded, prompts) == (expected, {})

    def test_a_sound_longer_than_it_hears_at_once_is_written_down_to_its_end(
        self, loaded: LoadedModel, prompts: list[MediaPrompt], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        long = [np.concatenate([*SOUNDS[:3]]), np.concatenate([*SOUNDS[1:]])]
        for number, sound in enumerate(long):
            monkeypatch.setitem(FILES, str(number), wav(sound))
        asked = [MediaPrompt(text="", audio=("0",)), prompts[1], MediaPrompt(text="", audio=("1",)), prompts[2]]
        expected = [self.written(loaded, sound) for sound in (long[0], SOUNDS[1], long[1], SOUNDS[2])]
        assert generate(loaded, asked) == (dict(enumerate(expected)), {})

    def test_a_text_ends_at_a_stop_string_and_before_the_decoder_is_full(
        self, loaded: LoadedModel, prompts: list[MediaPrompt]
    ) -> None:
        whole, _ = generate(loaded, prompts[:1])
        stop = whole[0][2]
        assert generate(loaded, prompts[:1], until=(stop,)) == ({0: whole[0].split(stop)[0]}, {})
        longest, errors = generate(loaded, prompts, max_gen_toks=4096)
        assert (len(longest), errors) == (len(prompts), {})

    def test_what_it_cannot_do_is_said(self, loaded: LoadedModel, prompts: list[MediaPrompt]) -> None:
        with pytest.raises(ValueError, match="do_sample must be false"):
            generate(loaded, prompts, do_sample=True)
        two = MediaPrompt(text="", audio=DIGESTS[:2])
        texts, errors = generate(loaded, [two, prompts[1]])
        assert list(texts) == [1]
        assert "hears one sound, and the prompt has 2" in errors[0]


class TestQwen2Audio:
    """A language model that hears."""

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, tiny_audio: Callable[[str], Path]) -> LoadedModel:
        return load_fresh(tiny_audio("qwen2_audio"), dtype="float32")

    @pytest.fixture(scope="class")
    @classmethod
    def contents(cls) -> list[list[str | int]]:
        """Texts, and numbers of sounds."""
        one: list[list[str | int]] = [[number, question] for number in range(len(SOUNDS)) for question in QUESTIONS]
        return [*one, ["First ", 0, " then ", 3, ". Which is louder?"], ["What is there?"]]

    @pytest.fixture(scope="class")
    @classmethod
    def prompts(cls, loaded: LoadedModel, contents: list[list[str | int]]) -> list[MediaPrompt]:
        assert loaded.processor is not None
        prompts: list[MediaPrompt] = []
        for content in contents:
            parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "audio"} for part in content]
            turn = [{"role": "user", "content": parts}]
            text = loaded.processor.processor.apply_chat_template(turn, add_generation_prompt=True)
            heard = tuple(DIGESTS[part] for part in content if isinstance(part, int))
            prompts.append(MediaPrompt(text=text, audio=heard))
        return prompts

    @staticmethod
    def inputs(loaded: LoadedModel, prompt: MediaPrompt, content: list[str | int]) -> Any:
        assert loaded.processor is not None
        sounds = [samples(SOUNDS[part]) for part in content if isinstance(part, int)]
        heard = {"audio": sounds, "sampling_rate": RATE} if sounds else {}
        return loaded.processor.processor(text=[prompt.text], **heard, return_tensors="pt")

    def test_prompts_share_batches(self, loaded: LoadedModel) -> None:
        assert loaded.media == MediaFacts(Company.ANY_LENGTH, shares_prompts=True)

    @pytest.mark.parametrize("batch_size", [1, 3, None])
    def test_texts_are_those_of_transformers(
        self,
        loaded: LoadedModel,
        prompts: list[MediaPrompt],
        contents: list[list[str | int]],
        batch_size: int | None,
    ) -> None:
        audio_token = loaded.model.config.audio_token_index
        expected: dict[int, str] = {}
        for number, (prompt, content) in enumerate(zip(prompts, contents, strict=True)):
            inputs = self.inputs(loaded, prompt, content)
            output = loaded.model.generate(
                **inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=[audio_token], pad_token_id=0
            )
            new = output[0, inputs["input_ids"].shape[1] :]
            expected[number] = loaded.tokenizer.decode(new, skip_special_tokens=True)
        assert len(set(expected.values())) > len(expected) // 2
        found = generate(loaded, prompts, batch_size, kwargs={"suppress_tokens": [audio_token]})
        assert found == (expected, {})

    @torch.inference_mode()
    def test_log_likelihoods_are_those_of_a_forward_pass(
        self, loaded: LoadedModel, prompts: list[MediaPrompt], contents: list[list[str | int]]
    ) -> None:
        texts = (" Paris", " the city of it", "Z")
        tokens = [tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        asked = MediaLoglikelihoodChunk(
            chunk_id=1,
            prompts=tuple(prompts),
            continuations=TokenSequences.pack(tokens * len(prompts)),
            prompt_of=tuple(number for number in range(len(prompts)) for _ in tokens),
        )
        chunk = MediaChunk(asked, Preparation(loaded.prepare).plan(asked.prompts, FILES))
        answers, errors = multimodal_scoring.score(loaded, chunk, lambda: False)
        assert errors == {}
        expected: list[float] = []
        for prompt, content in zip(prompts, contents, strict=True):
            for continuation in tokens:
                inputs = self.inputs(loaded, prompt, content)
                inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([continuation])], dim=1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                logits = loaded.model(**inputs).logits[0, -len(continuation) - 1 : -1].log_softmax(-1)
                expected.append(sum(float(row[one]) for row, one in zip(logits, continuation, strict=True)))
        assert [answers[number][0] for number in range(len(answers))] == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_a_file_that_is_no_sound_is_the_error_of_its_prompt(
        self, loaded: LoadedModel, prompts: list[MediaPrompt], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(FILES, "damaged", b"<html>")
        damaged = MediaPrompt(text=prompts[0].text, audio=("damaged",))
        texts, errors = generate(loaded, [prompts[0], damaged, prompts[1]])
        assert sorted(texts) == [0, 2]
        assert "the sound cannot be decoded" in errors[1]

    def test_a_sound_longer_than_it_hears_is_the_error_of_its_prompt(
        self, loaded: LoadedModel, prompts: list[MediaPrompt], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = prompts[0].text
        for name, seconds in {"long": 5.0, "just": 2.05}.items():
            monkeypatch.setitem(FILES, name, wav(tone(seconds)))
        longer = [MediaPrompt(text=text, audio=(name,)) for name in ("long", "just")]
        texts, errors = generate(loaded, [prompts[0], *longer])
        assert sorted(texts) == [0, 2]
        assert "the sound is 5.0 seconds long" in errors[1]
        assert "it hears 2 seconds at once" in errors[1]
