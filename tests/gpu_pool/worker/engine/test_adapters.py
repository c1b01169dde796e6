"""PEFT adapters against lm-eval's HF backend."""

import pytest
from checkpoint_forms import save_adapter
from engine_probes import fresh, plainly
from fresh_models import load_fresh
from lm_eval_answers import PROMPTS, lm_eval_texts, lm_eval_values, texts, values
from transformers import AutoModelForSeq2SeqLM

from gpu_pool.worker.engine.weights import UnsupportedModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft drops what generate makes
@pytest.mark.parametrize("kind", ["lora", "prompt tuning"])
def test_equals_lm_eval(kind, checkpoint, tmp_path, load, reference):
    from peft import LoraConfig, PromptTuningConfig, TaskType

    base = checkpoint("llama")
    settings = {
        "lora": LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"]),
        "prompt tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    }[kind]
    save_adapter(tmp_path, base, settings)
    adapted, theirs = load_fresh(base, peft=str(tmp_path)), reference(base, peft=str(tmp_path))
    assert values(adapted) == pytest.approx(lm_eval_values(theirs), rel=1e-5)
    assert values(adapted) != pytest.approx(values(load(base)), rel=1e-3)
    in_pieces = plainly(fresh(adapted, logits_bytes=1))
    assert values(in_pieces) == pytest.approx(values(adapted), rel=1e-5)
    assert in_pieces.layers is not None
    together = texts(adapted, PROMPTS[:4], max_gen_toks=8)
    assert together == texts(adapted, PROMPTS[:4], 1, max_gen_toks=8)


def test_encoder_decoder_equals_lm_eval(checkpoint, tmp_path, load, reference):
    from peft import LoraConfig, TaskType

    base = checkpoint("t5")
    settings = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=2, target_modules=["q", "v"])
    save_adapter(tmp_path, base, settings, AutoModelForSeq2SeqLM)
    adapted, theirs = load_fresh(base, peft=str(tmp_path)), reference(base, peft=str(tmp_path))
    assert values(adapted) == pytest.approx(lm_eval_values(theirs), rel=1e-5)
    assert values(adapted) != pytest.approx(values(load(base)), rel=1e-3)
    assert texts(adapted, PROMPTS, max_gen_toks=8) == lm_eval_texts(theirs, PROMPTS, max_gen_toks=8)


def test_prompt_tokens_of_an_encoder_decoder_are_refused(checkpoint, tmp_path):
    from peft import PromptTuningConfig, TaskType

    base = checkpoint("t5")
    settings = PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3, num_transformer_submodules=1)
    save_adapter(tmp_path, base, settings, AutoModelForSeq2SeqLM)
    with pytest.raises(UnsupportedModel, match="learnt prompt tokens"):
        load_fresh(base, peft=str(tmp_path))
