from __future__ import annotations

from typing import Any

import pytest

from gpu_pool.errors import InvalidRequest
from gpu_pool.gen_kwargs import GENERATION_KEYS, KNOWN_KEYS, WORKER_KEYS, parse_gen_kwargs, with_request


@pytest.mark.parametrize(
    "text",
    ["temperature=0,max_gen_toks=64", "", "  ", "temperature=0.7,top_p=.9,do_sample=true", "until='a=b'",
     'until="12"', "do_sample=False,top_k=50,", "temperature=1e-1", "until=</s>"],
)  # fmt: skip
def test_the_string_means_what_it_means_in_lm_eval(text: str) -> None:
    from lm_eval.utils import simple_parse_args_string

    assert parse_gen_kwargs(text) == simple_parse_args_string(text)


@pytest.mark.parametrize("text", ["5", "-5", "+5", "1e3", "1.5", "abc", "'5'", '"true"', "TRUE", "None", "", "٣"])
def test_a_value_means_what_it_means_in_lm_eval(text: str) -> None:
    from lm_eval.utils import handle_arg_string

    from gpu_pool.gen_kwargs import _parse_literal

    ours, theirs = _parse_literal(text), handle_arg_string(text)
    assert (type(ours), ours) == (type(theirs), theirs)


def test_objects_and_json_text() -> None:
    options = {"until": ["\n\n", "Q:"], "max_gen_toks": 8}
    assert parse_gen_kwargs(options) == options
    assert parse_gen_kwargs('{"until": ["\\n\\n", "Q:"], "max_gen_toks": 8}') == options
    assert parse_gen_kwargs(None) == {}


@pytest.mark.parametrize("text", ["temperature", "=5", "temperature=0,x", " = ", "{", "{}x", '{"a"}'])
def test_unparsable_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_gen_kwargs(text)
    assert caught.value.field == "gen_kwargs"


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", "hot"), ("temperature", None), ("temperature", float("nan")), ("top_p", 0),
     ("top_p", 1.5), ("top_p", True), ("max_gen_toks", 0), ("max_gen_toks", 2.5), ("max_gen_toks", "64"),
     ("max_new_tokens", -1), ("until", 5), ("until", ["a", 5]), ("do_sample", 1), ("num_beams", 0), ("top_k", -1)],
)  # fmt: skip
def test_wrong_values_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_gen_kwargs({key: value})
    assert caught.value.field == f"gen_kwargs.{key}"


@pytest.mark.parametrize(("key", "meant"), [("temprature", "temperature"), ("max_gen_tok", "max_gen_toks")])
def test_unknown_keys_come_with_the_closest(key: str, meant: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_gen_kwargs({key: 1})
    assert caught.value.field == f"gen_kwargs.{key}"
    assert caught.value.choices[0] == meant


def test_unknown_keys_come_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_gen_kwargs({"zzz": 1})
    assert all(key in caught.value.problem for key in KNOWN_KEYS)


def test_a_list_in_the_string_syntax_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="JSON object"):
        parse_gen_kwargs('until=["x"]')


def test_generation_keys_are_those_of_transformers() -> None:
    from transformers import GenerationConfig

    assert set(GENERATION_KEYS) | WORKER_KEYS <= set(GenerationConfig().__dict__)
    assert WORKER_KEYS.isdisjoint(KNOWN_KEYS)
    assert len(set(KNOWN_KEYS)) == len(KNOWN_KEYS)


@pytest.mark.parametrize(("key", "said"), [("max_length", "is `max_gen_toks`"), ("num_return_sequences", "`repeats`")])
def test_unknown_keys_come_with_what_is_meant(key: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as refused:
        parse_gen_kwargs({key: 2})
    assert refused.value.field == f"gen_kwargs.{key}"


@pytest.mark.parametrize(
    ("task", "request_", "meant"),
    [
        ({"max_gen_toks": 4}, {"max_new_tokens": 1}, {"max_new_tokens": 1}),
        ({"max_length": 99, "max_tokens": 4, "top_k": 5}, {"max_gen_toks": 1}, {"top_k": 5, "max_gen_toks": 1}),
        ({"max_gen_toks": 4, "top_k": 5}, {"max_gen_toks": 1}, {"max_gen_toks": 1, "top_k": 5}),  # as lm-eval has them
        ({"max_gen_toks": 4, "until": ["."]}, {"until": "!"}, {"max_gen_toks": 4, "until": "!"}),
    ],
)
def test_a_request_s_length_counts_whatever_its_name(
    task: dict[str, Any], request_: dict[str, Any], meant: dict[str, Any]
) -> None:
    assert list(with_request(task, request_).items()) == list(meant.items())
