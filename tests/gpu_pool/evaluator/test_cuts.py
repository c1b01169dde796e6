"""Cut texts have the tokens of whole ones, for every tokenizer that allows cuts; the others are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, PreTokenizer, Sequence, Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gpu_pool.evaluator import cuts
from gpu_pool.evaluator.tokenising import TextEncoder, Tokeniser

CORPUS = [
    "Question: what is the capital of France, and which of these is it?\nA. Paris\nB. 1,234 km\n\nAnswer: A\n\n",
    "it's they're I'll don't 12345 67 x = y + 1;\n\n\n  indented\tand\r\nmore… “quoted” é ü ñ 日本語 🙂🙂\n" * 3,
]
SPECIAL = ["<|begin|>", "<|end|>"]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
AFTER_WORDS = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + AFTER_WORDS
QWEN2 = LLAMA3.replace("{1,3}", "")
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")


def split(pattern: str, behaviour: str = "isolated", invert: bool = False) -> PreTokenizer:
    first = Split(Regex(pattern), behaviour, invert)
    return Sequence([first, ByteLevel(add_prefix_space=False, use_regex=False)])


def make(pre_tokenizer: PreTokenizer, *, bos: bool = False, normalizer: Any = None, added: tuple[Any, ...] = ()) -> Any:
    """A byte-level BPE tokenizer of 500 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    if bos:
        first = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


BYTES = ByteLevel(add_prefix_space=False)
CUTTABLE = {
    "gpt2": make(BYTES),
    "smollm": make(Sequence([Digits(individual_digits=True), BYTES])),
    "llama3": make(split(LLAMA3), bos=True),
    "qwen2": make(split(QWEN2), normalizer=normalizers.NFC()),
    "gpt4": make(split(CL100K, "removed", invert=True)),
    "gpt4o": make(split(O200K)),
    "tekken": make(split(TEKKEN), bos=True),
    "added": make(
        split(LLAMA3),
        normalizer=normalizers.NFC(),
        added=(AddedToken("  "), AddedToken("\n\n"), AddedToken(" Paris"), AddedToken("<x>", lstrip=True, rstrip=True)),
    ),
}

texts = st.one_of(
    st.text(),
    st.lists(
        st.one_of(
            st.sampled_from(
                [*SPECIAL, "<|be", "gin|>", "<x>", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u2028"]
            ),
            st.sampled_from(
                ["a", "Paris", "don't", "'S", "it\u2019s", "123", "4567", "²", "é", "e\u0301", "\u0301", "\u212a"]
            ),
            st.sampled_from(
                [".", "?!", "…", "/", "_", "日本", "🙂", "\U0001f469\u200d\U0001f467", "\u017f", "ǅ", "Answer:", "A"]
            ),
            st.text(max_size=3),
        ),
        max_size=25,
    ).map("".join),
)


def whole(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return tokenizer([text], **options)["input_ids"][0]


@pytest.mark.parametrize("name", CUTTABLE)
@given(text=texts)
@example(text="Answer: A\n\nQuestion")
@example(text="x \n\n y\n \n1")
@example(text="<|begin|>A <|end|> B")
def test_tokens_of_parts(name: str, text: str) -> None:
    tokenizer = CUTTABLE[name]
    assert cuts.obstacle(tokenizer.backend_tokenizer) is None
    *begin, last = cuts.lines(text)
    parts = [*begin, *cuts.before_last_word(last)]
    assert "".join(parts) == text
    options = {"add_special_tokens": False}
    joined = [token for part in parts for token in whole(tokenizer, part, **options)]
    assert joined == whole(tokenizer, text, **options)


@pytest.mark.parametrize("name", CUTTABLE)
@given(text=texts, addition=texts)
@example(text="<|beg", addition="in|> A")
@example(text="", addition="")
def test_encoders(name: str, text: str, addition: str) -> None:
    tokenizer = CUTTABLE[name]
    tokeniser = Tokeniser(tokenizer)
    before = whole(tokenizer, text, add_special_tokens=not text.startswith(SPECIAL[0]))
    both = whole(tokenizer, text + addition, add_special_tokens=not (text + addition).startswith(SPECIAL[0]))
    encoder = TextEncoder(tokeniser, {}, bos=SPECIAL[0])
    others = [(f"other {i}", f" pair {i}\nof {i}") for i in range(3)]
    found = encoder.extend([*others, (text, addition)])[text, addition]
    assert [tokens.tolist() for tokens in found] == [before, both[len(before) :]]
    assert encoder.encode([*(text for text, _ in others), text])[text].tolist() == before
    assert tokeniser.cuts_texts


def test_a_real_tokenizer(smollm2: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(smollm2 / "tokenizer.json"))
    tokeniser = Tokeniser(tokenizer)
    assert tokeniser.cuts_texts
    found = TextEncoder(tokeniser, {}).extend((text, " more\n\nA b") for text in CORPUS)
    for text in CORPUS:
        joined = np.concatenate(found[text, " more\n\nA b"])
        assert joined.tolist() == whole(tokenizer, text + " more\n\nA b")


def changed(**parts: Any) -> Tokenizer:
    tokenizer = make(BYTES).backend_tokenizer
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer


OBSTACLES = {
    "a model that is no BPE": Tokenizer(models.Unigram([("a", 0.0)], 0)),
    "dropout": changed(model=models.BPE(dropout=0.1)),
    "a pre-tokenizer that joins words": changed(pre_tokenizer=Metaspace()),
    "no pre-tokenizer": changed(pre_tokenizer=None),
    "a space put before": changed(pre_tokenizer=ByteLevel(add_prefix_space=True)),
    "an unknown pattern": changed(pre_tokenizer=split(GPT2.replace(r" ?\p{L}+", r"\p{L}+\s?"))),
    "a pattern that may leave whitespace together": changed(pre_tokenizer=split(r"\p{N}{1,3}")),
    "another way to split": changed(pre_tokenizer=split(GPT2, "merged_with_previous")),
    "whitespace that is lost": changed(pre_tokenizer=Sequence([WhitespaceSplit(), BYTES])),
    "a normalizer": changed(normalizer=normalizers.Replace("a b", "c")),
    "an end token": changed(
        post_processor=processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    ),
    "an added token over a cut": make(BYTES, added=("Fr ance",)).backend_tokenizer,
    "an added token that takes spaces": make(BYTES, added=(AddedToken("Paris", rstrip=True),)).backend_tokenizer,
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacles(obstacle: str) -> None:
    assert cuts.obstacle(OBSTACLES[obstacle]) is not None


def test_plain_encoding_of_a_sentencepiece_tokenizer() -> None:
    vocabulary = [("<unk>", 0.0), *((piece, -float(i)) for i, piece in enumerate(["▁", "▁a", "▁a▁b", "a", "b", "c"]))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0))
    tokenizer.pre_tokenizer = Metaspace(split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokeniser = Tokeniser(fast)
    assert not tokeniser.cuts_texts
    first, more = TextEncoder(tokeniser, {}).extend([("a", " b c")])["a", " b c"]
    assert [first.tolist(), more.tolist()] == [whole(fast, "a"), whole(fast, "a b c")[1:]]


def test_a_tokenizer_whose_parts_differ_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make(Sequence([Metaspace(), BYTES]))
    tokeniser = Tokeniser(tokenizer)
    tokeniser.cuts_texts = True  # as if the list of what is known were wrong
    texts = [f"the capital of France\nis {i}" for i in range(10)]
    found = TextEncoder(tokeniser, {}).encode(texts)
    assert all(found[text].tolist() == whole(tokenizer, text) for text in texts)
    assert not tokeniser.cuts_texts
    assert "tokenised whole from now on" in caplog.text


def test_tokens_are_compact() -> None:
    found = TextEncoder(Tokeniser(CUTTABLE["gpt2"]), {}).extend([("Question", " A"), ("Question", " B")])
    assert {tokens.dtype for pair in found.values() for tokens in pair} == {np.dtype(np.uint32)}
    assert found["Question", " A"][0] is found["Question", " B"][0]
