"""Weights of 4 and 8 bits, by bitsandbytes on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chunks import generating
from engine_probes import never
from fresh_models import load_fresh
from lm_eval_answers import lm_eval_values, values

pytest.importorskip("bitsandbytes", reason="an optional package: pip install 'evalpool[quantization]'")

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loaded_model import LoadedModel

CASES: dict[str, dict[str, Any]] = {
    "8-bit": {"load_in_8bit": True},
    "4-bit": {"load_in_4bit": True},
    "4-bit nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "4-bit in bf16": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
}


def scores(loaded: LoadedModel) -> list[float]:
    """One request at a time: in 8 bits bitsandbytes looks for outliers in all rows of a batch at once."""
    return values(loaded, batch_size=1)


def lm_eval_scores(model: Any, folder: Path) -> list[float]:
    """lm-eval on a model that transformers quantised: it has no way of its own to ask transformers 5 for that."""
    from lm_eval.models.huggingface import HFLM

    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    theirs = HFLM(model, backend=backend, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)
    return lm_eval_values(theirs)


def quantised(folder: Path, loader: Any = AutoModelForCausalLM, **options: Any) -> Any:
    config = BitsAndBytesConfig(**options)
    return loader.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=config)


@pytest.mark.parametrize("case", CASES)
def test_equals_lm_eval_on_the_model_that_transformers_quantises(case, tiny_model, load):
    folder = tiny_model
    loaded = load_fresh(folder, **CASES[case])
    assert "bitsandbytes weights" in loaded.describe()
    ours = scores(loaded)
    assert ours == pytest.approx(lm_eval_scores(quantised(folder, **CASES[case]), folder), rel=1e-5)
    full = scores(load(folder))
    assert ours != pytest.approx(full, rel=1e-5)
    assert ours == pytest.approx(full, rel=0.5, abs=4.0)


def test_an_encoder_decoder(checkpoint):
    folder = checkpoint("t5")
    theirs = lm_eval_scores(quantised(folder, AutoModelForSeq2SeqLM, load_in_8bit=True), folder)
    assert scores(load_fresh(folder, load_in_8bit=True)) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_checkpoint_loads_as_it_is(case, tiny_model, tmp_path):
    quantised(tiny_model, **CASES[case]).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    loaded = load_fresh(tmp_path)
    assert "bitsandbytes weights" in loaded.describe()
    before = scores(loaded)
    assert before == pytest.approx(scores(load_fresh(tiny_model, **CASES[case])), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_weights_overwritten_in_place_do_not_reach_a_loaded_model(case, tiny_model, tmp_path):
    quantised(tiny_model, **CASES[case]).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    before = scores(load_fresh(tmp_path))
    loaded = load_fresh(tmp_path)
    weights = tmp_path / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(b"\0" * weights.stat().st_size)
    assert scores(loaded) == before


def test_generation(tiny_model):
    loaded = load_fresh(tiny_model, load_in_8bit=True)
    chunk = generating([(5, 6, 7), (8, 9)], max_gen_toks=8)
    assert all(generate(loaded, chunk, never))
