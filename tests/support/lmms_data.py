"""Small local files with the columns of data sets that lmms-eval's tasks read, showing handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from digits import held_out, image_bytes

DOCUMENTS = 12
IMAGE = datasets.Image()


def write_lmms_data(folder: Path, damaged: tuple[int, int] | tuple[()] = ()) -> dict[str, str]:
    """The data of mme, mmmu_val, seedbench_ppl and arc_easy; gives the setting `dataset_roots` for them.

    Of the two images at the places `damaged`, the first is cut off, and the second is grey, too.
    """
    files = [image_bytes(image) for image, _ in held_out(DOCUMENTS)]
    for place, mode in zip(damaged, ("RGB", "L"), strict=bool(damaged)):
        files[place] = image_bytes(held_out(DOCUMENTS)[place][0].convert(mode))[:-40]
    shown = [
        ({"bytes": file, "path": None}, digit) for file, (_, digit) in zip(files, held_out(DOCUMENTS), strict=True)
    ]
    sets = {
        "lmms-lab-encoder/MME": ("test", [_mme(*pair, i) for i, pair in enumerate(shown)]),
        "lmms-lab-encoder/MMMU": ("validation", [_mmmu(*pair, i) for i, pair in enumerate(shown)]),
        "lmms-lab-encoder/SEED-Bench": ("test", [_seed(*pair, i) for i, pair in enumerate(shown)]),
        "allenai/ai2_arc:ARC-Easy": ("test", [_arc(i) for i in range(DOCUMENTS)]),
    }
    roots: dict[str, str] = {}
    for name, (split, rows) in sets.items():
        place = folder / name.replace("/", "_").replace(":", "_")
        place.mkdir(parents=True)
        data = datasets.Dataset.from_list(rows)
        for column in ("image", "image_1"):
            if column in data.column_names:
                kind = datasets.List(IMAGE) if isinstance(rows[0][column], list) else IMAGE
                data = data.cast_column(column, kind)
        data.to_parquet(place / f"{split}.parquet")
        roots[name] = str(place)
    return roots


def _mme(image: dict[str, Any], digit: int, place: int) -> dict[str, Any]:
    """Two questions of a picture have one id; here two pictures."""
    asked = digit if place % 2 else (digit + 1) % 10
    return {
        "question_id": f"q{place // 2}",
        "image": image,
        "question": f"Is this a {asked}? Please answer yes or no.",
        "answer": "Yes" if asked == digit else "No",
        "category": "count" if place < DOCUMENTS // 2 else "code_reasoning",
    }


def _mmmu(image: dict[str, Any], digit: int, place: int) -> dict[str, Any]:
    subject = ("Math", "Music")[place % 2]
    return {
        "id": f"validation_{subject}_{place}",
        "question": "<image 1> Which digit is this?",
        "options": "[]",
        "question_type": "open",
        "answer": str(digit),
        "image_1": image,
    }


def _seed(image: dict[str, Any], digit: int, place: int) -> dict[str, Any]:
    right = place % 4
    choices = {f"choice_{'abcd'[i]}": str((digit + i - right) % 10) for i in range(4)}
    return {
        "question_id": str(place),
        "image": [image],
        "question": "Which digit is this?",
        **choices,
        "answer": "ABCD"[right],
        "data_type": "image",
    }


def _arc(place: int) -> dict[str, Any]:
    choices = {"text": ["the city", "a question", "France"], "label": ["A", "B", "C"]}
    return {"id": f"arc{place}", "question": f"Which is {place}?", "choices": choices, "answerKey": "ABC"[place % 3]}
