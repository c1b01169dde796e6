"""Write a tiny random vision-language checkpoint, always the same: `python make_tiny_vlm.py FAMILY FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from make_tiny_model import make_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # wide enough that answers differ from each other
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
IDEFICS_IMAGES: dict[str, Any] = {
    "size": {"longest_edge": 56},
    "max_image_size": {"longest_edge": 28},
    "do_image_splitting": True,
}
QWEN_TOKENS = {"image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}

TEMPLATE = (
    "{{% for message in messages %}}{{{{ message['role'] }}}}:{{% if message['content'] is string %}}"
    "{{{{ message['content'] }}}}{{% else %}}{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
    "{{% endif %}}\n{{% endfor %}}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
)


def make(family: str) -> tuple[Any, Any]:
    """The model and its processor."""
    return {
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "llava": _llava,
        "idefics3": _idefics3,
        "smolvlm": _smolvlm,
        "mllama": _mllama,
        "gemma3": _gemma3,
        "llava_next": _llava_next,
        "llava_onevision": _llava_onevision,
        "internvl": _internvl,
        "paligemma": _paligemma,
    }[family]()


def _tokenizer(**named: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(named.values())})
    return tokenizer


def _ids(tokenizer: Any) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).to(torch.float32).eval()
    for name, weight in model.named_parameters():  # towers forget their ranges: then every image would look the same
        if weight.ndim > 1 and "language_model" not in name and "lm_head" not in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def _qwen(model_type: str, tokenizer: Any, vision: dict[str, Any], image_processor: Any) -> tuple[Any, Any]:
    of = tokenizer.convert_tokens_to_ids
    config = AutoConfig.for_model(
        model_type,
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_parameters": MROPE, **_ids(tokenizer)},
        vision_config=vision,
        image_token_id=of(QWEN_TOKENS["image"]),
        video_token_id=of(QWEN_TOKENS["video"]),
        vision_start_token_id=of(QWEN_TOKENS["start"]),
        vision_end_token_id=of(QWEN_TOKENS["end"]),
        tie_word_embeddings=False,
    )
    template = TEMPLATE.format(image=QWEN_TOKENS["start"] + QWEN_TOKENS["image"] + QWEN_TOKENS["end"])
    return _model(config), _Parts(tokenizer, image_processor, template)


def _qwen2_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer(**QWEN_TOKENS)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 9)
    return _qwen("qwen2_vl", tokenizer, vision, images)


def _qwen2_5_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer(**QWEN_TOKENS)
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 64}
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 9)
    return _qwen("qwen2_5_vl", tokenizer, vision | {"fullatt_block_indexes": [1]}, images)


def _qwen3_vl() -> tuple[Any, Any]:
    tokenizer = _tokenizer(**QWEN_TOKENS)
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 64}
    vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    images = transformers.Qwen2VLImageProcessorPil(min_pixels=32 * 32, max_pixels=32 * 32 * 9, patch_size=16)
    return _qwen("qwen3_vl", tokenizer, vision, images)


def _llava() -> tuple[Any, Any]:
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return _of_llava("llava", images, transformers.LlavaProcessor)


def _llava_next() -> tuple[Any, Any]:
    shapes = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **shapes
    )
    return _of_llava("llava_next", images, transformers.LlavaNextProcessor, **shapes)


def _of_llava(model_type: str, images: Any, make_processor: Any, **fields: Any) -> tuple[Any, Any]:
    tokenizer = _tokenizer(image="<image>")
    config = AutoConfig.for_model(
        model_type,
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer), **_ids(tokenizer)},
        vision_config=CLIP,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        **fields,
    )
    processor = make_processor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.format(image="<image>"),
    )
    return _model(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    tokenizer = _tokenizer(image="<image>", video="<video>")
    shapes = {"image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]]}
    config = AutoConfig.for_model(
        "llava_onevision",
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer), **_ids(tokenizer)},
        vision_config=SIGLIP,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **shapes,
    )
    images = transformers.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, **shapes)
    options = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4}
    options |= {"vision_feature_select_strategy": "full"}
    return _model(config), _Parts(tokenizer, images, TEMPLATE.format(image="<image>"), options)


def _internvl() -> tuple[Any, Any]:
    named = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    named |= {"video_token": "<video>"}
    tokenizer = _tokenizer(**named)
    tokenizer.init_kwargs["extra_special_tokens"] = named
    tokenizer._set_model_specific_special_tokens(named)
    config = AutoConfig.for_model(
        "internvl",
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer), **_ids(tokenizer)},
        vision_config=CLIP | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    options = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    return _model(config), _Parts(tokenizer, images, TEMPLATE.format(image="<IMG_CONTEXT>"), options)


def _paligemma() -> tuple[Any, Any]:
    tokenizer = _tokenizer(image="<image>")
    config = AutoConfig.for_model(
        "paligemma",
        text_config=TEXT | {"model_type": "gemma", "vocab_size": len(tokenizer), **_ids(tokenizer)},
        vision_config=SIGLIP,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    images = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    template = TEMPLATE.format(image="<image>")
    return _model(config), transformers.PaliGemmaProcessor(images, tokenizer, chat_template=template)


def _idefics3() -> tuple[Any, Any]:
    model, tokenizer = _of_idefics("idefics3")
    images = transformers.Idefics3ImageProcessorPil(**IDEFICS_IMAGES)
    template = TEMPLATE.format(image="<image>")
    return model, transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def _smolvlm() -> tuple[Any, Any]:
    model, tokenizer = _of_idefics("smolvlm")
    images = transformers.SmolVLMImageProcessorPil(**IDEFICS_IMAGES)
    options = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
    return model, _Parts(tokenizer, images, TEMPLATE.format(image="<image>"), options)


def _of_idefics(model_type: str) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    named = {"image": "<image>", "fake": "<fake_token_around_image>", "global": "<global-img>"}
    rows = {f"row{i}{j}": f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)}
    tokenizer = _tokenizer(**named, **rows, end="<end_of_utterance>")
    vision = {name: CLIP[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = AutoConfig.for_model(
        model_type,
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer), **_ids(tokenizer)},
        vision_config=vision | {"num_attention_heads": 4, "image_size": 28, "patch_size": 7},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return _model(config), tokenizer


def _mllama() -> tuple[Any, Any]:
    tokenizer = _tokenizer(image="<|image|>", python="<|python_tag|>")
    vision = {"hidden_size": 32, "attention_heads": 4, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"intermediate_size": 64, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "mllama",
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "cross_attention_layers": [1], **_ids(tokenizer)},
        vision_config=vision | {"intermediate_layers_indices": [0], "vision_output_dim": 64},
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    model = _model(config)
    for name, weight in model.named_parameters():
        if "gate" in name and weight.numel() == 1:
            torch.nn.init.ones_(weight)  # closed at first: no image would be seen
    images = transformers.MllamaImageProcessorPil(size={"height": 28, "width": 28})
    return model, transformers.MllamaProcessor(images, tokenizer, chat_template=TEMPLATE.format(image="<|image|>"))


def _gemma3() -> tuple[Any, Any]:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(named.values())})
    tokenizer.init_kwargs["extra_special_tokens"] = named
    tokenizer._set_model_specific_special_tokens(named)
    of = tokenizer.convert_tokens_to_ids
    config = AutoConfig.for_model(
        "gemma3",
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "query_pre_attn_scalar": 8, "sliding_window": 16, **_ids(tokenizer)}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_id=of(named["image_token"]),
        boi_token_index=of(named["boi_token"]),
        eoi_token_index=of(named["eoi_token"]),
        tie_word_embeddings=False,
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    template = TEMPLATE.format(image=named["boi_token"])
    return _model(config), transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


class _Parts:
    """A processor whose own class cannot be made without torchvision: what its checkpoint consists of."""

    def __init__(
        self, tokenizer: Any, image_processor: Any, chat_template: str, options: dict[str, Any] | None = None
    ) -> None:
        """`options` are what its processor_config.json says, if it has one."""
        tokenizer.chat_template = chat_template
        self.tokenizer, self.image_processor, self.options = tokenizer, image_processor, options

    def save_pretrained(self, folder: str) -> None:
        """As the hub's checkpoints of such models have it."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        if self.options is not None:
            Path(folder, "processor_config.json").write_text(json.dumps(self.options))


def main(family: str, folder: str) -> None:
    model, processor = make(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
