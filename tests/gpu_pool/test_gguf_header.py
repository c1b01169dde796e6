"""GGUF headers, as the format's own package writes them, and files that are none."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import pytest

from gpu_pool.gguf_header import read_gguf_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with every kind of value, and tensors of two floating types."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_head_count_kv([2, 4, 2])
    writer.add_layer_norm_rms_eps(0.5)
    writer.add_bool("llama.flag", True)
    writer.add_array("llama.weights", [0.5, 1.5])
    writer.add_token_list(["a", "ä", "b"])
    writer.add_tensor("token_embd.weight", numpy.zeros((5, 4), dtype=numpy.float16))
    writer.add_tensor("blk.0.norm.weight", numpy.zeros(4, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_it_says(file: Path) -> None:
    header = read_gguf_header(file)
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.attention.head_count_kv": [2, 4, 2],
        "llama.attention.layer_norm_rms_epsilon": 0.5,
        "llama.flag": True,
    }
    assert header.shapes == {"token_embd.weight": (4, 5), "blk.0.norm.weight": (4,)}
    assert header.elements == 24
    assert header.float_type == "F16"


def test_quantised_blocks_have_no_floating_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(numpy.ones((3, 64), dtype=numpy.float32), kind)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "q.gguf")
    assert (header.elements, header.float_type) == (192, None)


def test_a_file_that_is_cut_off_or_none(file: Path) -> None:
    whole = file.read_bytes()
    for length in (0, 3, 10, 40, 150, 400):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"GGUF|cut off"):
            read_gguf_header(file)
    file.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(16))
    with pytest.raises(ValueError, match="version 9"):
        read_gguf_header(file)
    file.write_bytes(whole[:24] + b"\xff" * 8 + whole[32:])  # a key of 2^64 - 1 bytes
    with pytest.raises(ValueError, match="no readable GGUF header"):
        read_gguf_header(file)
