"""How a checkpoint's weights are read, and which checkpoints are refused."""

import pytest
import torch
from fresh_models import change_json, load_fresh
from lm_eval_answers import values

from gpu_pool.worker.engine.weights import NoGpuVisible, UnsupportedModel


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_dtype(dtype, expected, checkpoint):
    assert load_fresh(checkpoint("llama"), dtype=dtype).dtype == expected


def test_half_precision_scores_in_full_precision(checkpoint, load):
    half = values(load_fresh(checkpoint("llama"), dtype="bfloat16"))
    assert half == pytest.approx(values(load(checkpoint("llama"))), rel=0.05, abs=0.5)
    assert any(torch.tensor(value).bfloat16().item() != value for value in half)


def test_attention_implementation(checkpoint, load):
    loaded = load_fresh(checkpoint("llama"), attn_implementation="eager")
    assert loaded.attn_implementation == "eager"
    assert values(loaded) == pytest.approx(values(load(checkpoint("llama"))), rel=1e-5)


def test_weights_overwritten_in_place_do_not_reach_a_loaded_model(copied, checkpoint):
    loaded = load_fresh(copied)
    before = values(loaded)
    (copied / "model.safetensors").write_bytes(b"")
    assert values(loaded) == before


def test_speech_model_is_refused(copied):
    change_json(copied / "config.json", model_type="voxtral", architectures=["VoxtralForConditionalGeneration"])
    with pytest.raises(UnsupportedModel, match="voxtral is a speech model"):
        load_fresh(copied)


def test_decoder_without_its_encoder_is_refused(copied):
    """As BartForCausalLM saves it: lm-eval's HF backend would load it with an encoder of random weights."""
    change_json(copied / "config.json", model_type="bart", architectures=["BartForCausalLM"], is_encoder_decoder=False)
    with pytest.raises(UnsupportedModel, match="the decoder of a bart model alone"):
        load_fresh(copied)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_cuda_without_a_gpu_is_refused(checkpoint):
    with pytest.raises(NoGpuVisible):
        load_fresh(checkpoint("llama"), device="cuda")
