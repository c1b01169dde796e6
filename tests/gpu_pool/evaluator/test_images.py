"""Images of documents: where their files come from, and that nothing is decoded which nobody looks at."""

from __future__ import annotations

import hashlib
import io
import os
import socket
from collections.abc import Generator
from pathlib import Path

import datasets
import numpy as np
import pytest
from digits import image_bytes
from PIL import Image

from gpu_pool.evaluator import images
from gpu_pool.evaluator.disk_room import DiskRoom
from gpu_pool.evaluator.images import ImageProblem, UndecodedImage, described, image_file, shown_in
from gpu_pool.evaluator.media_files import MediaFiles

RED = Image.new("RGB", (4, 3), "red")
FILE = image_bytes(RED)


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.Image, "decode_example", datasets.Image.decode_example)
    images.leave_undecoded()


@pytest.fixture
def files(tmp_path: Path) -> Generator[MediaFiles]:
    files = MediaFiles(tmp_path / "new", DiskRoom(lambda what: None))
    yield files
    files.close()


def rows(*values: object) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "several": datasets.List(datasets.Image())})
    return datasets.Dataset.from_list([{"image": value, "several": [value]} for value in values], features=features)


@pytest.mark.usefixtures("undecoded")
def test_images_of_data_sets_are_left_as_files() -> None:
    row = rows({"bytes": FILE, "path": None}, {"bytes": b"no image", "path": None})[1]
    assert image_file(row["image"], ()) == image_file(row["several"][0], ()) == b"no image"


@pytest.mark.usefixtures("undecoded")
def test_code_that_looks_at_an_image_finds_it_decoded() -> None:
    image = rows({"bytes": FILE, "path": None})[0]["image"]
    assert isinstance(image, UndecodedImage)
    assert (image.size, image.mode, image.convert("L").mode) == ((4, 3), "RGB", "L")
    assert image.copy().getpixel((0, 0)) == (255, 0, 0)
    image.paste((0, 0, 255), (0, 0, 4, 3))
    with Image.open(io.BytesIO(image_file(image, ()))) as shown:
        assert shown.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.usefixtures("undecoded")
def test_images_in_lists_answer_as_others_do() -> None:
    row = rows({"bytes": FILE, "path": None})[0]
    [image] = row["several"]
    assert isinstance(image, UndecodedImage)
    assert isinstance(image, Image.Image)
    assert np.asarray(image).shape == (3, 4, 3)


@pytest.mark.usefixtures("undecoded")
def test_an_image_that_has_the_mode_stays_a_file() -> None:
    image = rows({"bytes": FILE, "path": None})[0]["image"]
    assert image_file(image.convert("RGB"), ()) == FILE
    with Image.open(io.BytesIO(image_file(image.convert("L"), ()))) as grey:
        assert grey.mode == "L"


@pytest.mark.usefixtures("undecoded")
def test_an_image_that_cannot_be_decoded_is_a_problem_of_its_own() -> None:
    image = rows({"bytes": FILE[:40], "path": None})[0]["image"]
    with pytest.raises(ImageProblem, match="the image cannot be decoded"):
        image.convert("L")


@pytest.mark.usefixtures("undecoded")
def test_processed_documents_keep_their_images() -> None:
    mapped = rows({"bytes": FILE, "path": None}).map(lambda row: {"width": row["image"].width, **row})
    assert mapped[0]["width"] == 4
    assert image_file(mapped[0]["image"], ()) == FILE


@pytest.mark.parametrize(
    "image",
    [FILE, {"bytes": FILE, "path": "x"}, {"bytes": None, "path": "red.png"}, "red.png", Path("red.png")],
    ids=["bytes", "data set", "path of a data set", "path", "path object"],
)
def test_where_files_come_from(tmp_path: Path, image: object) -> None:
    (tmp_path / "red.png").write_bytes(FILE)
    assert image_file(image, [tmp_path / "elsewhere", tmp_path]) == FILE


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_code_are_encoded_without_loss(mode: str) -> None:
    image = Image.new(mode, (5, 4), 1 if mode in ("1", "L", "P", "I;16", "F") else None)
    with Image.open(io.BytesIO(image_file(image, ()))) as found:
        assert found.convert("RGB").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (None, "has no image"),
        ({"bytes": None, "path": None}, "has no image"),
        ("nowhere.png", "nowhere.png does not exist"),
        (".", "no regular file"),
        ("pipe.png", "no regular file"),
        ("a\0b.png", "does not exist"),
        (300 * "x" + ".png", "cannot be read"),
        ("foo://x.png", "cannot be read"),
        ("http://[x.png", "cannot be read"),
        (5, "not int"),
        (bytes(images.MAX_FILE_BYTES + 1), "are allowed"),
    ],
)
def test_images_that_cannot_be_had_say_why(tmp_path: Path, image: object, why: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageProblem, match=why):
        image_file(image, [tmp_path])


def test_a_web_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ImageProblem, match="cannot be read"):
        image_file(f"http://127.0.0.1:{server.getsockname()[1]}/x.png", ())


def test_a_url_of_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(FILE)
    assert image_file((tmp_path / "a b.png").as_uri(), ()) == FILE


def test_one_image_or_lists_of_them() -> None:
    assert list(shown_in("a")) == ["a"]
    assert list(shown_in([["a", "b"], "c", []])) == ["a", "b", "c"]


def test_descriptions_take_the_place_of_images() -> None:
    digest = hashlib.sha256(FILE).hexdigest()
    document = {"image": UndecodedImage({"bytes": FILE, "path": "x.png"}, None), "n": 1, "several": [FILE], "pil": RED}
    found = described(document)
    assert found["image"] == {"path": "x.png", "sha256": digest, "bytes": len(FILE)}
    assert found["several"] == [{"sha256": digest, "bytes": len(FILE)}]
    assert found["pil"]["image"] == "RGB 4 x 3"
    assert found["n"] == 1


def test_files_are_kept_once_on_disk(files: MediaFiles, tmp_path: Path) -> None:
    digests = [files.add(data) for data in (b"one", b"two", b"one", b"")]
    assert digests[0] == digests[2] == hashlib.sha256(b"one").hexdigest()
    assert [files.read(digest) for digest in digests] == [b"one", b"two", b"one", b""]
    assert list((tmp_path / "new").iterdir()) == [], "the file has no name"
