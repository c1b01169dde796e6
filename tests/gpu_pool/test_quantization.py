from __future__ import annotations

from typing import Any

import pytest

from gpu_pool.errors import InvalidRequest
from gpu_pool.quantization import PACKAGES, bitsandbytes_options, check_bitsandbytes, check_quantization
from gpu_pool.records import ModelArgs, ModelSpec


def args(**fields: Any) -> ModelArgs:
    return ModelArgs(pretrained="m", **fields)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that count as installed, whatever really is."""
    names: set[str] = set()
    monkeypatch.setattr("gpu_pool.quantization.find_spec", lambda name: object() if name in names else None)
    return names


def test_methods_are_those_that_transformers_knows() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    assert {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING} == {
        *PACKAGES
    }


def test_options_are_those_of_bitsandbytes_config() -> None:
    assert bitsandbytes_options(args()) is None
    assert bitsandbytes_options(args(load_in_8bit=True)) == {"load_in_8bit": True, "load_in_4bit": False}
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert bitsandbytes_options(args(**four)) == {**four, "load_in_8bit": False}


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_4bit"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type"),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "auto"}, "bnb_4bit_compute_dtype"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int4"}, "bnb_4bit_quant_storage"),
        ({"load_in_4bit": True, "gguf_file": "m.gguf"}, "load_in_4bit"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], key: str, installed: set[str]) -> None:
    installed.add("bitsandbytes")
    with pytest.raises(InvalidRequest) as caught:
        check_bitsandbytes(args(**fields))
    assert caught.value.field == f"model_args.{key}"


def test_the_missing_package_is_named(installed: set[str]) -> None:
    with pytest.raises(InvalidRequest, match=r"bitsandbytes.*evalpool\[quantization\]") as caught:
        check_bitsandbytes(args(load_in_8bit=True))
    assert caught.value.field == "model_args.load_in_8bit"
    installed.add("bitsandbytes")
    check_bitsandbytes(args(load_in_8bit=True))


@pytest.mark.parametrize(
    ("quantization", "needed"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["optimum", "gptqmodel"]),
        ({"quant_method": "quanto"}, ["optimum", "optimum.quanto"]),
        ({"load_in_4bit": True}, ["bitsandbytes"]),
        ({"quant_method": "fp8"}, []),
    ],
)
def test_quantised_checkpoints_need_their_packages(
    quantization: dict[str, Any], needed: list[str], installed: set[str]
) -> None:
    configs = ({"quantization_config": quantization}, {"text_config": {"quantization_config": quantization}})
    if needed:
        for config in configs:
            with pytest.raises(InvalidRequest, match=", ".join(needed)) as caught:
                check_quantization(config, args(), "model")
            assert caught.value.field == "model"
    installed.update(needed)
    for config in configs:
        check_quantization(config, args(), "model")


def test_quantised_checkpoints_are_not_quantised_again(installed: set[str]) -> None:
    installed.add("bitsandbytes")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    with pytest.raises(InvalidRequest, match="bitsandbytes already") as caught:
        check_quantization(config, args(load_in_4bit=True), "model")
    assert caught.value.field == "model_args.load_in_4bit"


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="'magic', which transformers does not know"):
        check_quantization({"quantization_config": {"quant_method": "magic"}}, args(), "model")


def test_a_plain_checkpoint_needs_nothing(installed: set[str]) -> None:
    check_quantization({"model_type": "llama"}, args(), "model")


def test_replicas_of_other_bits_are_others() -> None:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    wanted = ({}, {"load_in_8bit": True}, {"load_in_4bit": True}, nf4)
    keys = {ModelSpec(kind="hf", args=args(**fields), fingerprint="f").replica_key for fields in wanted}
    assert len(keys) == 4
