"""Small local files with the columns of the hub's data sets, so that stock tasks run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def arc(count: int) -> list[dict[str, Any]]:
    choices = {"text": ["cold", "hot", "wet"], "label": ["A", "B", "C"]}
    return [
        {"id": f"arc{i}", "question": f"What is {i}?", "choices": choices, "answerKey": "ABC"[i % 3]}
        for i in range(count)
    ]


def piqa(count: int) -> list[dict[str, Any]]:
    return [{"goal": f"do {i}", "sol1": "so", "sol2": "not so", "label": i % 2} for i in range(count)]


def hellaswag(count: int) -> list[dict[str, Any]]:
    rows = {"activity_label": "Cooking", "ctx_a": "A man cooks", "endings": ["well [x]", "ill", "now", "on"]}
    return [{**rows, "ctx_b": f"he {i}", "label": str(i % 4)} for i in range(count)]


def mmlu(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"Q{i}", "subject": "law", "choices": ["1", "2", "3", "4"], "answer": i % 4} for i in range(count)
    ]


def write_stock_data(folder: Path) -> dict[str, str]:
    """A file or folder for each data set, in several formats; gives the setting `dataset_roots` for them."""
    for split, count in {"train": 8, "test": 6}.items():
        path = folder / "arc" / "ARC-Easy" / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(arc(count)).to_parquet(path)
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in piqa(6)))
    datasets.DatasetDict(validation=datasets.Dataset.from_list(hellaswag(6))).save_to_disk(folder / "hellaswag")
    for split, count in {"dev": 5, "test": 6}.items():
        datasets.Dataset.from_list(mmlu(count)).save_to_disk(folder / "mmlu" / "abstract_algebra" / split)
    return {
        "allenai/ai2_arc": str(folder / "arc"),
        "baber/piqa::validation": str(folder / "piqa.jsonl"),
        "Rowan/hellaswag": str(folder / "hellaswag"),
        "cais/mmlu": str(folder / "mmlu" / "{config}" / "{split}"),
    }
