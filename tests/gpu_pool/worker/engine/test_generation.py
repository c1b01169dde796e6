"""Texts of decoder-only models against lm-eval's HF backend."""

from typing import Any

import pytest
from chunks import generating
from engine_probes import fresh, never, out_of_memory_beyond, plainly
from lm_eval_answers import PROMPTS, lm_eval_texts, texts

from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.generation import generate


def test_equals_lm_eval_in_batches(checkpoint, load, reference):
    theirs = lm_eval_texts(reference(checkpoint("llama"), batch_size=7), PROMPTS, max_gen_toks=24)
    assert texts(load(checkpoint("llama")), PROMPTS, max_gen_toks=24) == theirs


def test_lm_eval_has_no_use_for_several_responses(checkpoint, reference):
    """Which is why `num_return_sequences` is refused: a request has one text, and its backend fails on more."""
    with pytest.raises(ValueError, match="zip"):
        lm_eval_texts(reference(checkpoint("llama")), PROMPTS[:1], num_beams=2, num_return_sequences=2, max_gen_toks=2)


@pytest.mark.parametrize("batch_size", [1, None])
def test_stop_strings(batch_size, checkpoint, load, reference):
    folder = checkpoint("llama")
    unstopped = texts(load(folder), PROMPTS, max_gen_toks=24)
    until = [text[5:7] for text in unstopped[:3]]
    theirs = lm_eval_texts(reference(folder), PROMPTS, max_gen_toks=24, until=list(until))
    ours = texts(load(folder), PROMPTS, batch_size, max_gen_toks=24, until=tuple(until))
    assert ours == theirs
    assert ours != unstopped


def test_generation_ends_with_the_last_stop_string(checkpoint, load):
    loaded = load(checkpoint("llama"))
    until = tuple({text[3] for text in texts(loaded, PROMPTS[:4], max_gen_toks=200)})
    steps: list[int] = []
    hook = loaded.model.register_forward_pre_hook(lambda *_: steps.append(1))
    texts(loaded, PROMPTS[:4], max_gen_toks=200, until=until)
    hook.remove()
    assert len(steps) < 100


def test_long_prompts_lose_their_beginning(checkpoint, load, reference):
    folder = checkpoint("llama")
    theirs = lm_eval_texts(reference(folder, max_length=40), PROMPTS, max_gen_toks=24)
    assert texts(load(folder, max_length=40), PROMPTS, max_gen_toks=24) == theirs


def test_end_of_sequence_token_ends_a_text(checkpoint, load, reference):
    folder = checkpoint("llama")
    first = load(folder).tokenizer.encode(texts(load(folder), PROMPTS[:1], max_gen_toks=24)[0][4:])[0]
    theirs = lm_eval_texts(reference(folder), PROMPTS, max_gen_toks=24, eos_token_id=first)
    ours = texts(load(folder), PROMPTS, max_gen_toks=24, kwargs={"eos_token_id": first})
    assert ours == theirs


@pytest.mark.parametrize(
    "kwargs",
    [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"num_beams": 3}, {"max_length": 70}],
)
def test_options_equal_lm_eval_one_at_a_time(kwargs, checkpoint, load, reference):
    folder = checkpoint("llama")
    prompts = [prompt[:40] for prompt in PROMPTS]
    theirs = lm_eval_texts(reference(folder), prompts, max_gen_toks=24, until=["e"], **kwargs)
    assert texts(load(folder), prompts, max_gen_toks=24, until=("e",), kwargs=kwargs) == theirs


def test_a_first_token_is_forced_whatever_its_id(checkpoint, load):
    """Also 0, and for a prompt of one token alone, which padding would make longer."""
    loaded = plainly(load(checkpoint("llama")))
    options = {"max_gen_toks": 6, "kwargs": {"forced_bos_token_id": 0}}
    chunk = [(5,), (5, 6, 7), (9,)]
    together = generate(loaded, generating(chunk, **options), never)
    assert together == tuple(generate(loaded, generating([prompt], **options), never)[0] for prompt in chunk)
    assert together != generate(loaded, generating(chunk, max_gen_toks=6), never)


@pytest.mark.parametrize("way", [fresh, plainly])
def test_what_memory_did_not_suffice_for_is_not_tried_again(way, checkpoint, load):
    prompts = [f"{n} {prompt[:30]}" for n in range(6) for prompt in PROMPTS]
    expected = texts(way(load(checkpoint("llama"))), prompts, max_gen_toks=12)
    loaded = way(fresh(load(checkpoint("llama")), scored_tokens=50))
    with out_of_memory_beyond(loaded, read=128, continued=3) as failures:
        assert texts(loaded, prompts, max_gen_toks=12) == expected
        assert failures
        failures.clear()
        assert texts(loaded, prompts, max_gen_toks=12) == expected
        assert not failures


def test_think_end_token(checkpoint, load, reference):
    folder = checkpoint("llama")
    text = texts(load(folder), PROMPTS[:1], max_gen_toks=24)[0]
    by_text = {"think_end_token": text[6:8]}
    assert texts(load(folder, **by_text), PROMPTS, max_gen_toks=24) == lm_eval_texts(
        reference(folder, **by_text), PROMPTS, max_gen_toks=24
    )
    by_id = {"think_end_token": str(load(folder).tokenizer.encode(text[6:])[0])}
    assert texts(load(folder, **by_id), PROMPTS, max_gen_toks=24) == lm_eval_texts(
        reference(folder, **by_id), PROMPTS, max_gen_toks=24
    )


SAMPLING: dict[str, Any] = {
    "max_gen_toks": 16,
    "do_sample": True,
    "kwargs": {"temperature": 0.9, "top_p": 0.95, "top_k": 50},
}


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_sampling_does_not_depend_on_the_batch(batch_size, checkpoint, load):
    loaded = load(checkpoint("llama"))
    seeds = tuple(range(len(PROMPTS)))
    ours = texts(loaded, PROMPTS, batch_size, seeds, **SAMPLING)
    backwards = texts(loaded, PROMPTS[::-1], 3, seeds[::-1], **SAMPLING)
    assert ours == backwards[::-1]
    assert ours != texts(loaded, PROMPTS, batch_size, tuple(seed + 100 for seed in seeds), **SAMPLING)


def test_beam_sampling_does_not_depend_on_the_batch(checkpoint, load):
    loaded = load(checkpoint("llama"))
    options = SAMPLING | {"kwargs": {"temperature": 0.9, "num_beams": 2}}
    ours = texts(loaded, PROMPTS[:3], None, (1, 2, 3), **options)
    assert ours[1:] == texts(loaded, PROMPTS[1:3], 2, (2, 3), **options)


def test_sampling_follows_the_softmax():
    """Frequencies of each token's draw against its probability: within five standard errors."""
    import torch

    from gpu_pool.worker.engine.sampling import SeededNoise

    count = 5000
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    noise = SeededNoise(range(count), torch.device("cpu"))
    drawn = noise(torch.empty(0), probabilities.log().repeat(count, 1)).argmax(-1)
    shares = drawn.bincount(minlength=5) / count
    assert ((shares - probabilities).abs() <= 5 * (probabilities * (1 - probabilities) / count).sqrt()).all()


def test_no_room_for_the_prompt_is_refused(checkpoint, load):
    with pytest.raises(ValueError, match="must be less than the context length"):
        texts(load(checkpoint("llama")), PROMPTS, max_gen_toks=256)


def test_empty_prompt_starts_from_the_prefix_token(checkpoint, load):
    loaded = load(checkpoint("llama"))
    prefix = generating([(loaded.prefix_token_id,)], max_gen_toks=8)
    assert texts(loaded, [""], max_gen_toks=8) == generate(loaded, prefix, never)


def test_cancelled_at_the_next_token(checkpoint, load):
    asked = iter([False, False, True])
    chunk = generating([(5, 6)], max_gen_toks=100)
    with pytest.raises(Cancelled):
        generate(load(checkpoint("llama")), chunk, lambda: next(asked))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, None])
def test_real_model_equals_lm_eval(batch_size, smollm2, load, reference):
    prompts = [
        "The capital of France is",
        "Question: How many legs does a spider have?\nAnswer:",
        "Once upon a time there was a small dog who lived near a big river. One day",
    ]
    theirs = lm_eval_texts(reference(smollm2), prompts, max_gen_toks=16, until=["\n\n"])
    assert texts(load(smollm2), prompts, batch_size, max_gen_toks=16, until=("\n\n",)) == theirs
