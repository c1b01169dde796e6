"""The names of models that lmms-eval 0.7.3 and lm-eval 0.4.13 have, and what each is here: a table, and nothing else.

Sources: `lmms_eval/models/__init__.py` and the constructors of its classes, whose default checkpoints are here, and
`lm_eval/models/__init__.py`. Where transformers cannot load such a checkpoint without its own code and one of the same
weights exists that it can, that one is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

RunsOn = Literal["engine", "api", "package", "nothing"]


class ModelName(NamedTuple):
    """One name that `model` may be, beside a path or hub id."""

    name: str
    runs_on: RunsOn
    """Our engine, some families with a `package` that may be missing; an endpoint that the operator lists; lm-eval's
    class for a `package` that is not installed here, or cannot be; or nothing here."""
    pretrained: str | None = None
    """Of those that our engine runs, the checkpoint where the request names none; None: it must name one."""
    kind: Literal["chat", "completions"] | None = None
    """Of those that an endpoint answers, what kind of endpoint."""
    package: str | None = None
    reason: str | None = None
    """Why it cannot run here."""
    nearest: tuple[str, ...] = ()
    """Names that can, and come closest."""
    note: str | None = None
    defaults: Mapping[str, int] = MappingProxyType({})
    """Arguments, in our words, that are these where the request does not give them."""


_ENGINE: dict[str, str | None] = {
    # lm-eval's, and our own
    **dict.fromkeys(("hf", "hf-auto", "hf-causal", "hf-multimodal", "hf-mistral3", "transformers")),
    # lmms-eval's
    "aria": "rhymes-ai/Aria",
    "async_hf_model": "Qwen/Qwen2.5-VL-3B-Instruct",
    "fuyu": "adept/fuyu-8b",
    "gemma3": "google/gemma-3-27b-it",
    "gemma4": "google/gemma-4-31B-it",
    "glm4v": "zai-org/GLM-4.6V-Flash",
    "huggingface": "Qwen/Qwen2.5-VL-3B-Instruct",
    "idefics2": "HuggingFaceM4/idefics2-8b",
    "instructblip": "Salesforce/instructblip-vicuna-7b",
    "internvl3": "OpenGVLab/InternVL3-8B-hf",
    "internvl3_5": "OpenGVLab/InternVL3_5-8B-HF",
    "internvl_hf": "OpenGVLab/InternVL3_5-8B-HF",
    "lfm2_5_vl": "LiquidAI/LFM2.5-VL-1.6B",
    "llama4_scout": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "llama_vision": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_hf": "llava-hf/llava-1.5-7b-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "llava_vid": "llava-hf/llava-1.5-7b-hf",
    "mistral3_vl": "mistralai/Ministral-3-8B-Base-2512",
    "plm": "facebook/Perception-LM-8B",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen3_5": "Qwen/Qwen3.5-4B",
    "qwen3_vl": "Qwen/Qwen3-VL-4B-Instruct",
    "video_llava": "LanguageBind/Video-LLaVA-7B-hf",
    "videollama3": None,
}
"""Families that transformers loads, and the default checkpoint of each."""

_HEARING = {
    "hf-audiolm-qwen": None,
    "qwen2_audio": "Qwen/Qwen2-Audio-7B-Instruct",
    "whisper": "openai/whisper-tiny",
}
"""The same of families that only hear."""

SAME_WEIGHTS: dict[str, str] = {
    "OpenGVLab/InternVL3-8B": "OpenGVLab/InternVL3-8B-hf",
    "OpenGVLab/InternVL3_5-8B": "OpenGVLab/InternVL3_5-8B-HF",
    "liuhaotian/llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "liuhaotian/llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "lmms-lab/llava-onevision-qwen2-0.5b-ov": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "lmms-lab/llava-onevision-qwen2-7b-ov": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "lmms-lab/llava-onevision-qwen2-72b-ov": "llava-hf/llava-onevision-qwen2-72b-ov-hf",
}
"""Checkpoints that only lmms-eval's own classes load -> those of the same weights that transformers loads."""

_NOTES = {
    "internvl3": "the reference's default OpenGVLab/InternVL3-8B in transformers' format",
    "internvl3_5": "the reference's default OpenGVLab/InternVL3_5-8B in transformers' format",
    "llava": "the reference's default liuhaotian/llava-v1.5-7b in transformers' format",
    "llava_vid": "the reference's default liuhaotian/llava-v1.5-7b in transformers' format",
    "llava_onevision": "the reference's default lmms-lab/llava-onevision-qwen2-7b-ov in transformers' format",
    "videollama3": "the reference's default DAMO-NLP-SG/VideoLLaMA3-7B has code of its own; name one in transformers' "
    "format, such as lkhl/VideoLLaMA3-2B-Image-HF",
}

_FRAMES = {
    "aria": 64,
    "idefics2": 16,
    "llava_vid": 20,
    **dict.fromkeys(("async_hf_model", "gemma3", "gemma4", "huggingface", "internvl3", "internvl_hf"), 32),
    **dict.fromkeys(("llama4_scout", "llama_vision", "llava_hf", "llava_onevision", "mistral3_vl"), 32),
    **dict.fromkeys(("qwen2_5_vl", "qwen2_vl", "qwen3_vl"), 32),
}
"""How many of a video the reference's class shows, where it does not go by frames a second."""

_PIXELS = {
    "qwen2_5_vl": (256 * 28 * 28, 1605632),
    "qwen2_vl": (3136, 602112),
    "qwen3_5": (64 * 32 * 32, 128 * 32 * 32),
    "qwen3_vl": (256 * 28 * 28, 1605632),
}
"""The least and the most of an image to the reference's class, whatever the checkpoint's own processor says."""

_NEEDS: dict[str, str] = dict.fromkeys(("lfm2_5_vl", "llama4_scout", "plm"), "torchvision")
"""What transformers needs to read images for some families beside what is required here."""

_API: dict[str, Literal["chat", "completions"]] = {
    "async_openai": "chat",
    "gpt4v": "chat",
    "local-chat-completions": "chat",
    "local-completions": "completions",
    "openai": "chat",
    "openai-chat-completions": "chat",
    "openai-completions": "completions",
}
"""What an OpenAI-compatible endpoint answers."""

_PACKAGES = {
    "sglang": "sglang",
    "vllm": "vllm",
    "vllm-vlm": "vllm",
    "vllm_generate": "vllm",
    "whisper_vllm": "vllm",
}
"""What lm-eval runs by a package of its own -> that package."""

_NOTHING: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "its checkpoints need code of their own to read images, which transformers has no class for",
        ("qwen2_5_vl", "llava_onevision"),
        (
            *("cogvlm2", "illume_plus", "internvl", "internvl2", "llava_onevision1_5", "llava_onevision2", "mantis"),
            *("minicpm_v", "minimonkey", "nanovlm", "neo_ov", "ovis_u1", "phi3v", "phi4_multimodal", "qwen_vl", "ross"),
            *("slime", "tinyllava", "vora", "xcomposer2_4KHD", "xcomposer2d5"),
        ),
    ),
    (
        "its checkpoints need code of their own to watch videos, which transformers has no class for",
        ("qwen2_5_vl", "video_llava"),
        (
            *("auroracap", "cambrians", "cambrians_vsc", "cambrians_vsc_streaming", "cambrians_vsr", "egogpt"),
            *("internvideo2", "internvideo2_5", "llama_vid", "llava_onevision_moviechat", "longva", "longvila"),
            *("moviechat", "mplug_owl_video", "oryx", "penguinvl", "thyme", "videoChatGPT", "videochat2"),
            *("videochat_flash", "video_salmonn_2", "vila", "vqtoken"),
        ),
    ),
    (
        "its checkpoints need code of their own to hear, which transformers has no class for",
        ("qwen2_audio",),
        (
            *("aero", "aero_realtime_vllm", "baichuan_omni", "kimi_audio", "minicpm_o", "ola", "omnivinci"),
            *("uni_moe_2_omni", "vita", "whisper_tt"),
        ),
    ),
    (
        "its checkpoints hold a talker beside the thinker that reads, sees and hears, and are not loaded in part here; "
        "a checkpoint of the thinker alone runs as hf",
        ("hf", "qwen2_audio", "qwen2_5_vl"),
        ("qwen2_5_omni", "qwen3_omni"),
    ),
    (
        "its family is not among those that are asked with sounds here",
        ("qwen2_audio",),
        ("audio_flamingo_3",),
    ),
    (
        "it makes images or videos, and here models write text",
        ("qwen2_5_vl",),
        (
            *("bagel", "bagel_lmms_engine", "bagel_umm", "bagel_unig2u", "cosmos_wm", "fastvideo", "generation_api"),
            *("ltx_video", "magi1_wm", "mmada", "qwen_image_edit", "sam3", "wan2_1_t2i", "wan2_1_t2v", "wan2_2"),
            "wan2_2_t2v",
        ),
    ),
    (
        "its provider's own protocol is not spoken here; most providers have an OpenAI-compatible address too, and the "
        "operator can list that as an endpoint",
        ("openai",),
        (
            *("anthropic-chat", "anthropic-chat-completions", "anthropic-completions", "batch_gpt4", "claude"),
            *("gemini", "gpt4o_audio", "litellm", "litellm-chat", "litellm-chat-completions", "qwen_vl_api", "reka"),
            *("sglang-generate", "textsynth", "watsonx_llm"),
        ),
    ),
    (
        "it starts a server of its own; one that runs can be listed as an endpoint",
        ("openai", "llava_hf"),
        ("llava_sglang", "srt_api"),
    ),
    (
        "it asks a llama.cpp server: list that as an endpoint, or give the file to hf as `gguf_file`",
        ("local-completions", "hf"),
        ("ggml", "gguf"),
    ),
    (
        "it needs a runtime that evalpool does not drive",
        ("hf",),
        (
            *("habana", "ipex", "mamba_ssm", "megatron_lm", "nemo_lm", "neuronx", "onnxruntime", "onnxruntime-genai"),
            *("openvino", "steered", "trtllm", "winml"),
        ),
    ),
    ("it answers without a model", ("hf",), ("dummy", "from_log")),
)
"""Why, the nearest that can, and the names."""

_ALIASES = {
    "aero_realtime_vllm_chat": "aero_realtime_vllm",
    "async_hf": "async_hf_model",
    "async_openai_compatible": "async_openai",
    "async_openai_compatible_chat": "async_openai",
    "dummy_video_reader": "dummy",
    "gemini_api": "gemini",
    "litellm_chat": "litellm",
    "litellm_compatible": "litellm",
    "openai_compatible": "openai",
    "openai_compatible_chat": "openai",
}


def _of_engine(name: str, pretrained: str | None) -> ModelName:
    needs = _NEEDS.get(name)
    frames = {"num_frames": _FRAMES[name]} if name in _FRAMES else {}
    pixels = dict(zip(("min_pixels", "max_pixels"), _PIXELS.get(name, ()), strict=False))
    return ModelName(
        name,
        "engine",
        pretrained,
        package=needs,
        nearest=("hf", "qwen2_5_vl") if needs else (),
        note=_NOTES.get(name),
        defaults=MappingProxyType(frames | pixels),
    )


def _names() -> dict[str, ModelName]:
    table = [_of_engine(name, pretrained) for name, pretrained in _ENGINE.items()]
    table += [ModelName(name, "engine", default) for name, default in _HEARING.items()]
    table += [ModelName(name, "api", kind=kind) for name, kind in _API.items()]
    table += [ModelName(name, "package", package=package, nearest=("hf",)) for name, package in _PACKAGES.items()]
    table += [
        ModelName(name, "nothing", reason=reason, nearest=nearest)
        for reason, nearest, names in _NOTHING
        for name in names
    ]
    known = {entry.name: entry for entry in table}
    known |= {alias: known[name]._replace(name=alias) for alias, name in _ALIASES.items()}
    return {name: known[name] for name in sorted(known)}


MODEL_NAMES = _names()
"""Every name, sorted."""


# ---------------------------------------------------------------- arguments

RENAMED: dict[str, str] = {
    "fps": "fps",
    "interleave_visuals": "interleave",
    "max_frames_num": "num_frames",
    "max_image_size": "image_max_side",
    "max_num_frames": "num_frames",
    "model": "pretrained",
    "model_id_name": "pretrained",
    "model_path": "pretrained",
    "nframes": "num_frames",
    "num_frame": "num_frames",
    "torch_dtype": "dtype",
}
"""lmms-eval's names of arguments -> ours. `fps` means nothing here: a video is shown as `num_frames` images."""

FLAGS: dict[str, tuple[str, str]] = {
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2"),
    "use_flash_attn": ("attn_implementation", "flash_attention_2"),
}
"""lmms-eval's arguments that are true or false -> what true is here."""

MEANINGLESS: dict[str, str] = {
    "cache_dir": "the hub's cache is the server's",
    "chat_mode": "prompts are made by the checkpoint's own chat template",
    "conv_mode": "prompts are made by the checkpoint's own chat template",
    "conv_template": "prompts are made by the checkpoint's own chat template",
    "customized_config": "the checkpoint's configuration is used as it is",
    "device": "the pool places models",
    "device_map": "the pool places models",
    "low_cpu_mem_usage": "weights are always read without a second copy",
    "mm_spatial_pool_mode": "the checkpoint's class pools images in its own way",
    "mm_spatial_pool_stride": "the checkpoint's class pools images in its own way",
    "model_name": "the checkpoint's configuration says which model it is",
    "tie_weights": "the checkpoint's configuration says whether weights are tied",
    "token_strategy": "each frame of a video has a placeholder of its own",
    "truncate_context": "prompts with images are not cut",
    "use_cache": "keys and values are always kept",
    "use_custom_video_loader": "videos are read in one way",
    "video_decode_backend": "videos are read in one way",
}
"""lmms-eval's arguments that are accepted, and mean nothing here -> why."""
MEANINGLESS_VALUES: dict[str, tuple[object, ...]] = {
    "device": ("cuda", "cuda:0"),
    "device_map": ("", "auto", "cuda", "cuda:0"),
    "mm_spatial_pool_mode": ("bilinear",),
    "mm_spatial_pool_stride": (2,),
    "token_strategy": ("single",),
}
"""Of one of these, the values that are accepted; others ask for what is not done here."""
