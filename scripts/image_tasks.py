"""Local tasks with images, of scikit-learn's pictures and handwritten digits, for benchmarks of models that see."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

QUESTION = "<image>Which digit is this?"
_SHOWN: dict[str, Any] = {"doc_to_text": "{{question}}", "doc_to_image": ["image"]}
SIDE = 32
"""Pixels of a digit's picture."""
GENERATION: dict[str, Any] = _SHOWN | {
    "output_type": "generate_until",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOICE: dict[str, Any] = _SHOWN | {
    "output_type": "multiple_choice",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_digits(folder: Path, number: int) -> None:
    """`digits` and `digits_choice`: handwritten digits, 32 x 32 pixels. One asked again differs in a pixel."""
    digits = load_digits()
    places = [place for place in range(len(digits.target)) if place % 5 == 4]  # not trained on by the tiny model
    chosen = [places[place % len(places)] for place in range(number)]
    pictures = (_numbered(digit_picture(digits.images[place]), number) for number, place in enumerate(chosen))
    answers = [str(digits.target[place]) for place in chosen]
    data = _write(folder / "digits.parquet", pictures, answers, QUESTION)
    options = {"until": ["<end_of_utterance>"], "max_gen_toks": 4, "do_sample": False}
    write_task(folder, "digits", data, {**GENERATION, "doc_to_target": "{{answer}}", "generation_kwargs": options})
    choices = [f" {digit}" for digit in range(10)]
    write_task(
        folder,
        "digits_choice",
        data,
        {**CHOICE, "doc_to_target": "{{answer | int}}", "doc_to_choice": choices},
    )


def write_pictures(folder: Path, number: int, new_tokens: int) -> None:
    """`pictures`, continued by up to `new_tokens`, and `pictures_choice`: parts of two photographs, of any shape."""
    choices = [" a temple", " a flower", " a street in the rain", " somebody who is asleep"]
    answers = [str(place % 2) for place in range(number)]
    data = _write(folder / "pictures.parquet", islice(_parts(), number), answers, "<image>What does this show?")
    options = {"until": [], "max_gen_toks": new_tokens, "do_sample": False}
    write_task(folder, "pictures", data, {**GENERATION, "doc_to_target": "{{answer}}", "generation_kwargs": options})
    write_task(
        folder,
        "pictures_choice",
        data,
        {**CHOICE, "doc_to_target": "{{answer | int}}", "doc_to_choice": choices},
    )


def _numbered(picture: Image.Image, number: int) -> Image.Image:
    picture.putpixel((0, 0), (0, number >> 8, number & 255))
    return picture


def digit_picture(pixels: Any) -> Image.Image:
    """One of scikit-learn's digits, as the tiny model was trained on them: 32 x 32, RGB."""
    grey = (np.asarray(pixels) / 16.0 * 255).astype("uint8")
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def _parts() -> Iterator[Image.Image]:
    """Parts of the two photographs by turns, no two alike: 200 to 640 pixels wide, 200 to 427 high."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = np.random.default_rng(0)
    for place in count():
        photograph = photographs[place % 2]
        width, height = (int(draw.integers(200, side + 1)) for side in photograph.size)
        left, top = (int(draw.integers(0, room + 1)) for room in (photograph.width - width, photograph.height - height))
        yield photograph.crop((left, top, left + width, top + height))


def _write(path: Path, pictures: Iterator[Image.Image], answers: list[str], question: str) -> Path:
    def rows() -> Iterator[dict[str, Any]]:
        for picture, answer in zip(pictures, answers, strict=True):
            file = io.BytesIO()
            picture.save(file, "PNG")
            yield {"image": {"bytes": file.getvalue(), "path": None}, "answer": answer, "question": question}

    kinds = {"image": datasets.Image(), "answer": datasets.Value("string"), "question": datasets.Value("string")}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows()), features=datasets.Features(kinds)).to_parquet(path)
    return path


def write_task(folder: Path, name: str, data: Path, config: dict[str, Any]) -> None:
    """A task in lm-eval's YAML over a Parquet file."""
    folder.mkdir(parents=True, exist_ok=True)
    source = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **config}, sort_keys=False))
