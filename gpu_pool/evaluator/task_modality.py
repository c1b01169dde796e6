"""What a task's documents show beside text: told from its YAML and the Python beside it, without importing that.

lm-eval's YAML says it. lmms-eval's names a function that gives pictures, paths of videos or waveforms alike: what its
body speaks of tells which.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_pool.evaluator.package_files import function_file, module_file, parsed
from gpu_pool.records import Modality

_VIDEO = re.compile(r"video|\.mp4|\.mkv|\.webm|frames", re.IGNORECASE)
_PICTURE = re.compile(r"\.convert\(|Image\.open|PIL_?Image")
_FILE_OF_VIDEO = re.compile(r"\.mp4|\.mkv|\.webm|cache_dir|video_path", re.IGNORECASE)
"""Frames that a task's code decodes are pictures: only the file of a video is one."""
_AUDIO = re.compile(r"audio|\.wav|\.mp3|\.flac|sampling_rate|speech", re.IGNORECASE)
_MENTIONED_TYPE = {"image_url": "image", "image": "image", "video": "video", "audio": "audio"}


def lm_eval_modality(config: dict[str, Any]) -> Modality:
    """Of a task of lm-eval."""
    if config.get("doc_to_audio"):
        return "audio"
    if config.get("doc_to_video"):
        return "video"
    return "image" if config.get("doc_to_image") else "text"


def lmms_eval_modality(config: dict[str, Any]) -> Modality | None:
    """Of a task of lmms-eval; None where nothing tells."""
    visual, messages = config.get("doc_to_visual"), config.get("doc_to_messages")
    if visual is None:
        return "text" if messages is None else _of_messages(str(messages))
    if (config.get("dataset_kwargs") or {}).get("video"):
        return "video"
    if not isinstance(visual, str):
        return None
    named = function_file(visual)
    if named is None:
        return None if visual.startswith("/") else "image"  # a column of images
    if _gives_nothing(*named):
        return "text"
    source = "\n".join(_sources(*named, seen=set()))
    if not source:
        return None
    if _VIDEO.search(source) and (_FILE_OF_VIDEO.search(source) or not _PICTURE.search(source)):
        return "video"
    return "audio" if _AUDIO.search(source) else "image"


def _of_messages(function: str) -> Modality | None:
    """By the types of content that the function writes."""
    named = function_file(function)
    if named is None:
        return None
    source = "\n".join(_sources(*named, seen=set()))
    kinds = {_MENTIONED_TYPE[word] for word in re.findall(r"[\"'](\w+)[\"']", source) if word in _MENTIONED_TYPE}
    for modality in ("video", "audio", "image"):
        if modality in kinds:
            return modality
    return "text" if source else None


def _sources(path: Path, name: str, seen: set[tuple[Path, str]]) -> Iterator[str]:
    """The text of a function and of the functions of its file that it calls, wherever the file has imported them."""
    if (path, name) in seen:
        return
    seen.add((path, name))
    text, tree = parsed(path)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            yield ast.get_source_segment(text, node) or ""
            for other in sorted(_called(node)):
                yield from _sources(path, other, seen)
        elif isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            if node.module and not node.level and (elsewhere := module_file(node.module)):
                yield from _sources(elsewhere, original, seen)


def _gives_nothing(path: Path, name: str) -> bool:
    """Whether a function returns nothing, or an empty list, whatever it is given."""
    functions = [node for node in parsed(path)[1].body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not functions:
        return False
    [*_, function] = functions
    values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    return all(value is None or ast.unparse(value) in ("None", "[]") for value in values)


def _called(function: ast.FunctionDef) -> set[str]:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {called.id for called in calls if isinstance(called, ast.Name)}
