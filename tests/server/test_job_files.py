"""Pages of sample files larger than what is read at once, and of files that are replaced."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from gpu_pool.errors import NoSuchSamples
from gpu_pool.records import Evaluation, Job
from server.job_files import sample_page

COUNT = 3000


def job_with(path: Path) -> Job:
    evaluation = Evaluation(model="hf", tasks=("piqa",))
    return Job(id="1", work=evaluation, request={}, created_at=datetime.now(UTC), samples={"piqa": str(path)})


def write(path: Path, count: int, width: int) -> None:
    """Lines of different lengths, none of which ends where a block of reading does."""
    lines = (
        json.dumps({"doc_id": number, "text": "é" * (number % width)}, ensure_ascii=False) for number in range(count)
    )
    path.with_suffix(".new").write_text("".join(f"{line}\n" for line in lines))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("offset", [0, 1, 1499, COUNT - 2, COUNT, COUNT + 5])
@pytest.mark.parametrize("limit", [1, 700, COUNT + 1])
def test_any_page_of_a_large_file(tmp_path: Path, offset: int, limit: int) -> None:
    path = tmp_path / "samples.jsonl"
    write(path, COUNT, 1000)
    assert path.stat().st_size > 2 << 20
    page = sample_page(job_with(path), None, offset, limit)
    assert page.total == COUNT
    assert [msgspec.json.decode(sample) for sample in page.samples] == [
        {"doc_id": number, "text": "é" * (number % 1000)} for number in range(COUNT)[offset : offset + limit]
    ]


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for count in (10, 0, 4):
        write(path, count, 7)
        page = sample_page(job_with(path), None, 2, 100)
        assert page.total == count
        assert [msgspec.json.decode(sample)["doc_id"] for sample in page.samples] == list(range(count))[2:]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b'{"a":  "\xc3\xa9",\t"n": 1.50, "n": 12345678901234567890123}', None),
        (b'{"smile": "\\ud83d\\ude00", "path": "C:\\\\ud800"}', None),
        (b'{"nan": NaN, "inf": [Infinity, -Infinity]}', b'{"nan":null,"inf":[null,null]}'),
        (b'{"half": "\\ud83d", "\\udc00": "the other half"}', b'{"half":"?","?":"the other half"}'),
    ],
)
def test_a_record_is_shown_as_it_lies_in_the_file_unless_that_is_no_json(
    tmp_path: Path, line: bytes, shown: bytes | None
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"before": 1}\n' + line + b'\n{"after": 2}\n')
    page = sample_page(job_with(path), None, 0, 10)
    assert [bytes(sample) for sample in page.samples] == [b'{"before": 1}', shown or line, b'{"after": 2}']


def test_a_task_is_found_by_its_own_name_and_by_the_requested_one(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{number}.jsonl" for number, name in enumerate(("arc_easy", "lmms:arc_easy", "mme"))}
    for name, path in paths.items():
        path.write_text(json.dumps({"of": name}) + "\n")
    evaluation = Evaluation(model="hf", tasks=("lm:arc_easy", "lmms:arc_easy", "lmms:mme"))
    samples = {name: str(path) for name, path in paths.items()}
    job = Job(id="1", work=evaluation, request={}, created_at=datetime.now(UTC), samples=samples)
    for name in (*paths, "lm:arc_easy", "lmms:mme"):
        page = sample_page(job, name, 0, 10)
        assert page.task == name.removeprefix("lm:").replace("lmms:mme", "mme")
        assert msgspec.json.decode(page.samples[0]) == {"of": page.task}
    with pytest.raises(NoSuchSamples):
        sample_page(job, "lm:mme", 0, 10)


@pytest.mark.parametrize("line", [b'{"cut": "off', b'{"a": "\xff"}', b"", b"{} {}"])
def test_what_is_no_record_is_not_sent(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(ValueError):  # noqa: PT011 (of several kinds, all of them for the log)
        sample_page(job_with(path), None, 0, 10)
