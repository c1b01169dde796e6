"""Files of a job whose disk is full."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from small_disk import full, mounted

from gpu_pool.evaluator.disk_room import DiskRoom
from gpu_pool.evaluator.media_files import MediaFiles
from gpu_pool.results import ResultFiles

SAMPLE = {"arguments": [["a" * 100, "b"]], "resps": [[]], "filtered_resps": [], "target": 0}
SAMPLES = [SAMPLE] * 400


def test_it_is_waited_for_and_then_all_is_there(tmp_path: Path) -> None:
    said: list[str | None] = []
    waits, written = threading.Event(), threading.Event()

    def note(what: str | None) -> None:
        said.append(what)
        waits.set()

    room = DiskRoom(note)
    with mounted(tmp_path, 1 << 20) as folder:
        files, media = ResultFiles(folder, "m"), MediaFiles(folder, room)

        def write() -> None:
            results.append(room.wait(lambda: files.write_samples("task", SAMPLES)))
            digests.extend((media.add(b"x" * 100_000), media.add(b"y" * 100_000)))
            written.set()

        results: list[Path] = []
        digests: list[str] = []
        writing = threading.Thread(target=write)
        with full(folder):
            writing.start()
            assert waits.wait(60)
            assert not written.wait(1.0)
            assert [path.name for path in folder.rglob("*") if path.is_file()] == ["filler"]
        writing.join()
        [path] = results
        assert len(path.read_text().splitlines()) == len(SAMPLES)
        with full(folder):
            waits.clear()
            adding = threading.Thread(target=lambda: digests.append(media.add(b"z" * 100_000)))
            adding.start()
            assert waits.wait(60)
        adding.join()
        assert [media.read(digest) for digest in digests] == [letter * 100_000 for letter in (b"x", b"y", b"z")]
        media.close()
    first, then, second, last = said
    assert first == f"No space left on device: '{path}'; make room there, and the job goes on by itself"
    assert second == first.replace(str(path), str(folder))
    assert (then, last) == (None, None)


def test_what_no_room_would_mend_is_told_at_once() -> None:
    def write() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/results")

    with pytest.raises(PermissionError):
        DiskRoom(lambda what: pytest.fail("it waits")).wait(write)
