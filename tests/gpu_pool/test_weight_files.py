"""Which files count, and what is said of those that cannot be read; their sizes are compared where they are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpu_pool.records import ModelArgs
from gpu_pool.weight_files import Tensor, WeightFiles, read_safetensors, read_weight_files


def framed(header: bytes) -> bytes:
    """A safetensors file with this header and no data: nobody should look at it."""
    return len(header).to_bytes(8, "little") + header


def write(path: Path, **tensors: tuple[str, list[int]]) -> Path:
    """A safetensors file that says it has these tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]} for name, (kind, shape) in tensors.items()}
    path.write_bytes(framed(json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()))
    return path


def names(folder: Path, **args: str) -> list[str]:
    found = read_weight_files(ModelArgs(pretrained=str(folder), **args))
    assert found is not None
    return [tensor.name for tensor in found.tensors]


def test_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", a=("BF16", [3, 5]), b=("F4", [8]), c=("I64", []))
    tensors = read_safetensors(path)
    assert tensors[0] == Tensor(name="a", type="BF16", shape=(3, 5))
    assert [tensor.bytes for tensor in tensors] == [30, 4, 8]
    assert [tensor.is_float for tensor in tensors] == [True, False, False]


def test_the_files_that_transformers_prefers(tmp_path: Path) -> None:
    assert read_weight_files(ModelArgs(pretrained=str(tmp_path))) is None
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1000))
    assert read_weight_files(ModelArgs(pretrained=str(tmp_path))) == WeightFiles(opaque_bytes=1000)
    write(tmp_path / "shards" / "1.safetensors", first=("F32", [1]))
    write(tmp_path / "2.safetensors", second=("F32", [1]))
    index = {"weight_map": {"first": "shards/1.safetensors", "second": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(tmp_path) == ["second", "first"]
    write(tmp_path / "consolidated.safetensors", other=("F32", [1]))
    write(tmp_path / "model.safetensors", one=("F32", [1]))
    assert names(tmp_path) == ["one"]
    write(tmp_path / "inner" / "model.safetensors", inside=("F32", [1]))
    assert names(tmp_path, subfolder="inner") == ["inside"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"1234567", b"PK\3\4" + bytes(30), (2**40).to_bytes(8, "little"), framed(b"{}")[:-1]),
        *(framed(b"[]"), framed(b'{"a": {"dtype": 1'), framed(b'{"a": {"b": 1}}')),
        *(framed(b'{"a": {"dtype": "F32", "shape": 7}}'), framed(b'{"a": {"dtype": "F32", "shape": ["x"]}}')),
    ],
)
def test_a_file_without_a_header_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not a safetensors file"):
        read_safetensors(path)


def snapshot(cache: Path) -> Path:
    """Where the files of the commit lie in a hub cache, which has the model org/name."""
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    return repository / "snapshots" / "c0ffee"


def read_in_child(environment: dict[str, str]) -> str:
    """What a new interpreter, which has read that environment, finds of org/name."""
    code = (
        "from gpu_pool.weight_files import read_weight_files; from gpu_pool.records import ModelArgs;"
        "found = read_weight_files(ModelArgs(pretrained='org/name', revision='c0ffee'));"
        "print([(t.name, t.type, t.bytes) for t in found.tensors] if found else None)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | environment
    child = subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return child.stdout


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    folder = snapshot(tmp_path)
    assert read_in_child(environment) == "None\n"
    write(folder / "model.safetensors", a=("BF16", [3, 5]))
    assert read_in_child(environment) == "[('a', 'BF16', 30)]\n"


class Hub(SimpleHTTPRequestHandler):
    """As much of the hub as it takes to look at one commit: files by path, whole or in part."""

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{path.name}"')
        self.send_header("X-Repo-Commit", "c0ffee")
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_the_hub_is_asked_for_headers_only(tmp_path: Path) -> None:
    files = tmp_path / "hub" / "org" / "name" / "resolve" / "c0ffee"
    write(files / "1.safetensors", a=("BF16", [3, 5]))
    write(files / "2.safetensors", b=("F32", [2]))
    index = {"metadata": {"total_size": 38}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (files / "model.safetensors.index.json").write_text(json.dumps(index))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "hub"))) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_address[1]}"
        found = read_in_child({"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "NO_PROXY": "*"})
        hub.shutdown()
    assert found == "[('a', 'BF16', 30), ('b', 'F32', 8)]\n"
