"""Tasks of handwritten digits that nobody has trained on, for the vision-language model in `data/tiny-vlm-digits`.

The images are those of `train_report.json`: every fifth of scikit-learn's digits (UCI, CC BY 4.0), as 32 x 32 RGB.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from image_tasks import digit_picture, write_task
from PIL import Image
from sklearn.datasets import load_digits

MODEL = Path(__file__).parents[1] / "data" / "tiny-vlm-digits"
ACCURACY = 0.9777
"""Of the model, by its own training script: 351 of 359."""
QUESTION = "<image>Which digit is this?"
PROMPT = "{{question}}"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

GENERATION: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": PROMPT,
    "doc_to_target": "{{digit}}",
    "doc_to_image": ["image"],
    "generation_kwargs": {"until": ["<end_of_utterance>"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
    "filter_list": [
        {"name": "digit", "filter": [{"function": "regex", "regex_pattern": "([0-9])"}, {"function": "take_first"}]}
    ],
}
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": PROMPT,
    "doc_to_target": "{{digit}}",
    "doc_to_image": ["image"],
    "doc_to_choice": [" 0", " 1", " 2", " 3", " 4", " 5", " 6", " 7", " 8", " 9"],
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def held_out(count: int | None = None) -> list[tuple[Image.Image, int]]:
    """The first of the images, and the digits that they show."""
    digits = load_digits()
    places = np.arange(len(digits.target)) % 5 == 4
    pairs = list(zip(digits.images[places], digits.target[places], strict=True))[:count]
    return [(digit_picture(pixels), int(digit)) for pixels, digit in pairs]


def image_bytes(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_documents(path: Path, files: Iterable[bytes | None], digits: Iterable[int], questions: Sequence[str]) -> None:
    """A Parquet file whose `image` column is of images; None: the document has none."""
    rows = [
        {"image": file and {"bytes": file, "path": None}, "digit": digit, "question": question}
        for file, digit, question in zip(files, digits, questions, strict=True)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "digit": datasets.Value("int64"), "question": datasets.Value("string")}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def write_digits(folder: Path, change: Callable[[Image.Image], Image.Image] = lambda image: image) -> Path:
    """The tasks `digits` and `digits_choice` over all held-out images, each of them changed; returns their folder."""
    pairs = held_out()
    data = folder / "digits.parquet"
    files = [image_bytes(change(image)) for image, _ in pairs]
    write_documents(data, files, [digit for _, digit in pairs], [QUESTION] * len(pairs))
    write_task(folder, "digits", data, GENERATION)
    write_task(folder, "digits_choice", data, CHOICE)
    return folder
