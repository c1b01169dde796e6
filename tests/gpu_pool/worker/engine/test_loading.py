import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_pool.messages import GenerationChunk, GenerationOptions, LoglikelihoodChunk
from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loading import LoadedModel, NoGpuVisible, UnsupportedModel, load_model
from gpu_pool.worker.engine.loglikelihood import score

CHUNK = LoglikelihoodChunk(chunk_id=1, requests=(((5, 6, 7), (8,)), ((5, 6, 7, 9), (9, 10)), ((20,), (21, 22, 23))))


def fresh(folder: Path, device: Any = "cpu", allow_remote_code: bool = False, **args: Any) -> LoadedModel:
    spec = ModelSpec(kind="hf", args=ModelArgs(pretrained=str(folder), **args), fingerprint="", device=device)
    return load_model(spec, allow_remote_code=allow_remote_code)


def values(loaded: LoadedModel) -> list[float]:
    return [value for value, _ in score(loaded, CHUNK, lambda: False)]


def reference_values(reference: Any) -> list[float]:
    pairs = [(("", ""), list(context), list(continuation)) for context, continuation in CHUNK.requests]
    return [value for value, _ in reference._loglikelihood_tokens(pairs, disable_tqdm=True)]


@pytest.fixture
def copied(checkpoint, tmp_path) -> Path:
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def change_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_dtype(dtype, expected, checkpoint):
    assert fresh(checkpoint("llama"), dtype=dtype).dtype == expected


def test_half_precision_scores_in_full_precision(checkpoint, load):
    half = values(fresh(checkpoint("llama"), dtype="bfloat16"))
    assert half == pytest.approx(values(load(checkpoint("llama"))), rel=0.05, abs=0.5)
    assert any(torch.tensor(value).bfloat16().item() != value for value in half)


def test_attention_implementation(checkpoint, load):
    loaded = fresh(checkpoint("llama"), attn_implementation="eager")
    assert loaded.attn_implementation == "eager"
    assert values(loaded) == pytest.approx(values(load(checkpoint("llama"))), rel=1e-5)


@pytest.mark.parametrize("stated", [{}, {"max_position_embeddings": 77}])
def test_length_as_lm_eval_derives_it(stated, copied, reference):
    change_json(copied / "config.json", **stated)
    assert fresh(copied).max_length == reference(copied).max_length


@pytest.mark.parametrize("model_max_length", [None, 99])
def test_length_of_a_model_that_states_none(model_max_length, checkpoint, tmp_path, reference):
    folder = Path(shutil.copytree(checkpoint("mamba"), tmp_path / "model"))
    change_json(folder / "tokenizer_config.json", model_max_length=model_max_length)
    assert fresh(folder).max_length == reference(folder).max_length == (model_max_length or 2048)


@pytest.mark.parametrize("args", [{}, {"prefix_token_id": 9}])
def test_prefix_token(args, copied, reference):
    assert fresh(copied, **args).prefix_token_id == reference(copied, **args).prefix_token_id


def test_prefix_token_without_bos_is_eos(copied, reference):
    change_json(copied / "tokenizer_config.json", bos_token=None)
    assert fresh(copied).prefix_token_id == reference(copied).prefix_token_id == 2


def test_pad_token_is_found(copied):
    change_json(copied / "tokenizer_config.json", pad_token=None)
    assert fresh(copied).tokenizer.pad_token_id == 0  # the unknown token's, as lm-eval chooses


def test_subfolder(checkpoint, tmp_path, load):
    shutil.copytree(checkpoint("llama"), tmp_path / "inner")
    assert values(fresh(tmp_path, subfolder="inner")) == values(load(checkpoint("llama")))


def test_tokenizer_of_another_folder(copied, tiny_model):
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert fresh(copied, tokenizer=str(tiny_model)).tokenizer.name_or_path == str(tiny_model)


def test_weights_overwritten_in_place_do_not_reach_a_loaded_model(copied, checkpoint):
    loaded = fresh(copied)
    before = values(loaded)
    (copied / "model.safetensors").write_bytes(b"")
    assert values(loaded) == before


def save_adapter(folder: Path, base: Path, settings: Any) -> None:
    from peft import get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft drops what generate makes
@pytest.mark.parametrize("kind", ["lora", "prompt tuning"])
def test_adapter_equals_lm_eval(kind, checkpoint, tmp_path, load, reference):
    from peft import LoraConfig, PromptTuningConfig, TaskType

    base = checkpoint("llama")
    settings = {
        "lora": LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, target_modules=["q_proj", "v_proj"]),
        "prompt tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    }[kind]
    save_adapter(tmp_path, base, settings)
    adapted, theirs = fresh(base, peft=str(tmp_path)), reference(base, peft=str(tmp_path))
    assert values(adapted) == pytest.approx(reference_values(theirs), rel=1e-5)
    assert values(adapted) != pytest.approx(values(load(base)), rel=1e-3)
    prompts = GenerationChunk(chunk_id=1, prompts=((5, 6, 7), (8,)), options=GenerationOptions(max_gen_toks=8))
    together = generate(adapted, prompts, lambda: False)
    assert together == generate(adapted, msgspec.structs.replace(prompts, batch_size=1), lambda: False)


def save_gguf(path: Path, checkpoint: Path) -> None:
    """Write a Llama checkpoint as llama.cpp does, in full precision."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(checkpoint)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    spelled = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    tokens = sorted(spelled["vocab"], key=spelled["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in spelled["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp interleaves the halves of a rotated pair
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("split", [True, False])
def test_gguf(split, checkpoint, tmp_path, load):
    save_gguf(tmp_path / "tiny.gguf", checkpoint("llama"))
    loaded = fresh(tmp_path, gguf_file="tiny.gguf") if split else fresh(tmp_path / "tiny.gguf")
    assert values(loaded) == pytest.approx(values(load(checkpoint("llama"))), rel=1e-5)
    text = "which of these is it?"
    assert loaded.tokenizer.encode(text) == load(checkpoint("llama")).tokenizer.encode(text)


def test_encoder_decoder_is_refused(copied):
    change_json(copied / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    with pytest.raises(UnsupportedModel, match="t5 is an encoder-decoder model"):
        fresh(copied)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_cuda_without_a_gpu_is_refused(checkpoint):
    with pytest.raises(NoGpuVisible):
        fresh(checkpoint("llama"), device="cuda")


REMOTE_MODULE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_remote_code_only_when_asked_for_and_allowed(copied):
    (copied / "own.py").write_text(REMOTE_MODULE)
    change_json(
        copied / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    for asked, allowed in ((False, True), (True, False)):
        with pytest.raises(ValueError, match="trust_remote_code"):
            fresh(copied, trust_remote_code=asked, allow_remote_code=allowed)
    loaded = fresh(copied, trust_remote_code=True, allow_remote_code=True)
    assert type(loaded.model).__name__ == "OwnModel"
