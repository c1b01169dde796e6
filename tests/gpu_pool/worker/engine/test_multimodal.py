"""Prompts with images through the engine: what a model says does not depend on what it is asked beside."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from digits import MODEL as DIGITS
from fresh_models import load_fresh
from image_prompts import Asked, noise

from gpu_pool.chunk_messages import LoglikelihoodChunk, MediaPrompt
from gpu_pool.token_sequences import TokenSequences
from gpu_pool.worker.engine import loglikelihood
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.media import MediaError
from gpu_pool.worker.engine.multimodal_checks import MediaFacts

FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "internvl"),
    *("idefics3", "smolvlm", "gemma3", "mllama"),
)
SIZES = ((30, 40), (90, 50), (28, 28), (64, 64), (100, 30))
CONTINUATIONS = (" Paris", " the city of it", "Z", " the city", " the capital")


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tiny_vlm: Callable[[str], Path]) -> LoadedModel:
    return load_fresh(tiny_vlm(request.param), dtype="float32")


@pytest.fixture(scope="module")
def asked(loaded: LoadedModel) -> Asked:
    """Images of several sizes, before, between and after texts of several lengths; one prompt without any."""
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    questions = ("What is this?", "Which city can be seen here, and what is its capital?")
    contents = [[image, question] for image in images for question in questions]
    several = ["This is a ", images[0], " and this a ", images[2], ". Which is this?", images[1]]
    return Asked.of(loaded, *contents, several, ["What is there?"])


def tokens_of(loaded: LoadedModel) -> list[tuple[int, ...]]:
    return [tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in CONTINUATIONS]


def test_families_share_what_can_be_shared(loaded: LoadedModel) -> None:
    assert loaded.media == MediaFacts(Company.ANY_LENGTH, shares_prompts=True)


def test_what_can_be_shared_does_not_hang_on_how_words_are_cut() -> None:
    loaded = load_fresh(DIGITS, dtype="float32")
    this, that = loaded.tokenizer(["What is this?", "What is that?"])["input_ids"]
    assert len(this) != len(that)
    assert loaded.media == MediaFacts(Company.ANY_LENGTH, shares_prompts=True)


@pytest.fixture(scope="module")
def texts_alone(asked: Asked) -> dict[int, str]:
    return {number: asked.plain_text(number) for number in range(len(asked.prompts))}


@pytest.fixture(scope="module")
def scores_alone(asked: Asked) -> list[float]:
    numbers = range(len(asked.prompts))
    return [asked.plain_score(number, tokens) for number in numbers for tokens in tokens_of(asked.loaded)]


@pytest.mark.parametrize("batch_size", [1, 8, None])
def test_texts_are_those_of_each_prompt_alone(
    asked: Asked, texts_alone: dict[int, str], batch_size: int | None
) -> None:
    assert asked.generate(batch_size) == (texts_alone, {})


@pytest.mark.parametrize("batch_size", [1, 8, None])
def test_scores_are_those_of_a_forward_pass_for_each_choice(
    asked: Asked, scores_alone: list[float], batch_size: int | None
) -> None:
    answers, errors = asked.score(tokens_of(asked.loaded), batch_size)
    assert errors == {}
    assert [answers[request][0] for request in range(len(answers))] == pytest.approx(scores_alone, rel=1e-5)


def test_images_make_a_difference(scores_alone: list[float]) -> None:
    assert len({round(value, 4) for value in scores_alone}) > 0.9 * len(scores_alone)


def test_models_that_share_nothing_score_the_same(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    continuations = tokens_of(asked.loaded)
    shared, _ = asked.score(continuations)
    monkeypatch.setitem(vars(asked.loaded), "media", MediaFacts(Company.NONE, shares_prompts=False))
    alone, _ = asked.score(continuations)
    assert {request: answer[0] for request, answer in alone.items()} == pytest.approx(
        {request: answer[0] for request, answer in shared.items()}, rel=1e-5
    )


def test_text_is_scored_as_if_no_image_had_been_shown(asked: Asked) -> None:
    loaded = asked.loaded
    sequences = [tuple(range(5, 5 + length)) for length in (9, 14)]
    chunk = LoglikelihoodChunk(chunk_id=1, sequences=TokenSequences.pack(sequences), scored=(3, 4))
    with torch.inference_mode():
        expected = [
            float(
                loaded.model(input_ids=torch.tensor([tokens]))
                .logits[0, -scored - 1 : -1]
                .log_softmax(-1)
                .gather(1, torch.tensor(tokens[-scored:])[:, None])
                .sum()
            )
            for tokens, scored in zip(sequences, chunk.scored, strict=True)
        ]
    asked.generate(max_gen_toks=2)
    found = [answer for answer, _ in loglikelihood.score(loaded, chunk, lambda: False)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_prompts_that_do_not_fit_are_cut_before_their_images(tiny_vlm: Callable[[str], Path]) -> None:
    loaded = load_fresh(tiny_vlm("llava"), dtype="float32", max_length=60)
    picture = noise(28, 28)
    long = "many words " * 30
    asked = Asked.of(loaded, [long, picture, "What?"], [picture, long, "What?"])
    texts, errors = asked.generate()
    assert list(texts) == [0]
    assert list(errors) == [1]
    assert "cannot be cut" in errors[1]
    answers, errors = asked.score(tokens_of(loaded)[:1])
    assert list(answers) == [0]
    assert list(errors) == [1]
    assert "cannot be cut" in errors[1]


def test_the_last_token_of_a_choice_takes_no_room(tiny_vlm: Callable[[str], Path]) -> None:
    loaded = load_fresh(tiny_vlm("llava"), dtype="float32")
    asked = Asked.of(loaded, [noise(28, 28), "What?"])
    (choice, *_) = [tokens for tokens in tokens_of(loaded) if len(tokens) > 1]
    scored = {}
    for spare in (0, -1):
        needed = asked.inputs(0)["input_ids"].shape[1] + len(choice) - 1
        short = load_fresh(tiny_vlm("llava"), dtype="float32", max_length=needed + spare)
        scored[spare], _ = Asked(short, asked.prompts, asked.files).score([choice])
    assert scored[0][0][0] == pytest.approx(asked.plain_score(0, choice), rel=1e-5)
    assert scored[-1][0][0] != pytest.approx(scored[0][0][0], rel=1e-5)  # a token of text before the image is cut


def test_equal_answers_whatever_the_pixel_limits_of_others(tiny_vlm: Callable[[str], Path]) -> None:
    picture = noise(90, 90)
    lengths = [
        Asked.of(load_fresh(tiny_vlm("qwen2_vl"), dtype="float32", **limits), [picture, "What?"])
        .inputs(0)["input_ids"]
        .shape[1]
        for limits in ({}, {"max_pixels": 28 * 28 * 2}, {"min_pixels": 28 * 28 * 6})
    ]
    assert lengths[1] < lengths[0]
    assert lengths[2] >= 6


def test_pixel_limits_hold_where_the_processor_knows_none(tiny_vlm: Callable[[str], Path]) -> None:
    picture = noise(90, 90)
    shown: list[torch.Tensor] = []
    for image, limits in ((picture, {"max_pixels": 400}), (picture.resize((20, 20)), {}), (picture, {})):
        asked = Asked.of(load_fresh(tiny_vlm("llava"), dtype="float32", **limits), [image, "What?"])
        assert asked.loaded.processor is not None
        shown.append(asked.loaded.processor.prepare(asked.prompts[0], asked.files).tensors["pixel_values"])
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])


def test_a_model_without_an_image_processor_reads_text(
    tiny_vlm: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_vlm("llava").iterdir():
        if path.name != "processor_config.json":
            (folder / path.name).symlink_to(path)
    with caplog.at_level(logging.WARNING):
        loaded = load_fresh(folder, dtype="float32")
    assert loaded.processor is None
    assert "reads text only" in caplog.text
    with pytest.raises(MediaError, match=r"processor cannot be loaded: .*processor"):
        loaded.prepare(MediaPrompt(text="<image>"), {})


@pytest.mark.filterwarnings("default:__array__ implementation:DeprecationWarning")  # in its image processor
def test_what_follows_a_prompt_that_looks_at_all_of_itself_looks_back_only(tiny_vlm: Callable[[str], Path]) -> None:
    loaded = load_fresh(tiny_vlm("paligemma"), dtype="float32")
    asked = Asked.of(loaded, *([noise(30 + width, 40, width), "What is this?"] for width in range(3)))
    continuations = tokens_of(loaded)
    assert loaded.media == MediaFacts(Company.ANY_LENGTH, shares_prompts=True)
    answers, errors = asked.score(continuations)
    assert errors == {}
    expected = [asked.plain_score(number, tokens, token_type_ids=1) for number in range(3) for tokens in continuations]
    assert [answers[request][0] for request in range(len(answers))] == pytest.approx(expected, rel=1e-5)
