from __future__ import annotations

import hashlib
import os
import shutil
import threading
from pathlib import Path

import msgspec
import pytest
from small_disk import full, mounted

from gpu_pool import fingerprint
from gpu_pool.errors import InvalidRequest
from gpu_pool.fingerprint import changed_models, deserves_another_look, fingerprint_model, is_of_hub
from gpu_pool.records import ModelArgs, ModelSpec


@pytest.fixture
def memo(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "fingerprints.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def files_settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust files of any age, so that a test of the memo need not wait for its files to grow old."""
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -(10**12))


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(b"\1" * 4096)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def args(folder: Path, **more: object) -> ModelArgs:
    return ModelArgs(pretrained=str(folder), **more)  # type: ignore[arg-type]


def test_same_content_elsewhere_is_the_same_model(model: Path, tmp_path: Path, memo: Path) -> None:
    copy = make_model(tmp_path / "elsewhere")
    assert fingerprint_model(args(model), memo) == fingerprint_model(args(copy), memo)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "modeling_mine.py",
        "pytorch_model.bin",
        "generation_config.json",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_a_file_that_defines_the_model_counts(model: Path, memo: Path, name: str) -> None:
    before = fingerprint_model(args(model), memo)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("changed")
    assert fingerprint_model(args(model), memo) != before


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "training_args.bin",
        "README.md",
        ".gitattributes",
        "events.out.tfevents.1",
        "trainer_state.json",
        "rng_state_0.pth",
        "checkpoint-10/model.safetensors",
        "other.gguf",
    ],
)
def test_a_file_that_does_not_define_the_model_does_not_count(model: Path, memo: Path, name: str) -> None:
    before = fingerprint_model(args(model), memo)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("more")
    assert fingerprint_model(args(model), memo) == before


def test_shards_in_a_folder_below_count(model: Path, memo: Path) -> None:
    shard = model / "shards" / "1.safetensors"
    shard.parent.mkdir()
    shard.write_bytes(b"a")
    index = {"weight_map": {"embed": "shards/1.safetensors"}}
    (model / "model.safetensors.index.json").write_bytes(msgspec.json.encode(index))
    before = fingerprint_model(args(model), memo)
    shard.write_bytes(b"b")
    assert fingerprint_model(args(model), memo) != before


def test_adapter_and_tokenizer_count(model: Path, tmp_path: Path, memo: Path) -> None:
    adapter = make_model(tmp_path / "adapter")
    plain = fingerprint_model(args(model), memo)
    with_adapter = fingerprint_model(args(model, peft=str(adapter)), memo)
    with_tokenizer = fingerprint_model(args(model, tokenizer=str(adapter)), memo)
    assert len({plain, with_adapter, with_tokenizer}) == 3
    (adapter / "tokenizer.json").write_text("[]")
    assert fingerprint_model(args(model, tokenizer=str(adapter)), memo) != with_tokenizer
    (adapter / "model.safetensors").write_bytes(b"new")
    assert fingerprint_model(args(model, peft=str(adapter)), memo) != with_adapter


@pytest.mark.parametrize("key", ["peft", "tokenizer"])
def test_a_part_that_is_not_there_is_refused(model: Path, memo: Path, key: str) -> None:
    with pytest.raises(InvalidRequest, match=f"model_args.{key}: org/name does not exist"):
        fingerprint_model(args(model, **{key: "org/name"}), memo)


def test_of_a_gguf_folder_only_the_named_file_counts(tmp_path: Path, memo: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text(name)
    before = fingerprint_model(args(tmp_path, gguf_file="a.gguf"), memo)
    direct = fingerprint_model(args(tmp_path / "a.gguf"), memo)
    (tmp_path / "b.gguf").write_text("other")
    assert fingerprint_model(args(tmp_path, gguf_file="a.gguf"), memo) == before
    (tmp_path / "a.gguf").write_text("other")
    assert fingerprint_model(args(tmp_path, gguf_file="a.gguf"), memo) != before
    assert fingerprint_model(args(tmp_path / "a.gguf"), memo) != direct


def test_a_subfolder_counts_by_its_own_files(model: Path, memo: Path) -> None:
    inner = make_model(model / "inner")
    before = fingerprint_model(args(model, subfolder="inner"), memo)
    (model / "model.safetensors").write_bytes(b"not loaded")
    assert fingerprint_model(args(model, subfolder="inner"), memo) == before
    (inner / "model.safetensors").write_bytes(b"loaded")
    assert fingerprint_model(args(model, subfolder="inner"), memo) != before


def test_hub_models_are_their_commit(memo: Path, model: Path) -> None:
    hub = ModelArgs(pretrained="org/name", revision="abc")
    assert fingerprint_model(hub, memo) == "hub:org/name@abc"
    with_adapter = msgspec.structs.replace(hub, peft=str(model))
    assert fingerprint_model(with_adapter, memo).startswith("hub:org/name@abc+")
    assert is_of_hub(fingerprint_model(with_adapter, memo))
    assert not is_of_hub(fingerprint_model(args(model), memo))


def test_overwriting_within_the_clock_tick_is_noticed(model: Path, memo: Path) -> None:
    """Same inode, size and (as far as a coarse clock shows) times: a young file must never be believed."""
    weights = model / "model.safetensors"
    seen = set()
    for round_ in range(50):
        weights.write_bytes(bytes([round_]) * 4096)
        os.utime(weights, ns=(0, 0))
        seen.add(fingerprint_model(args(model), memo))
    assert len(seen) == 50


def test_young_files_are_not_remembered(model: Path, memo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_NS", 3600 * 10**9)  # younger than that they stay on any machine
    fingerprint_model(args(model), memo)
    assert not memo.exists()


@pytest.mark.usefixtures("files_settle_at_once")
def test_settled_files_are_read_once(model: Path, memo: Path) -> None:
    expected = fingerprint_model(args(model), memo)
    remembered = msgspec.json.decode(memo.read_bytes())
    key = next(key for key, (state, *_) in remembered.items() if state[2] == 4096)
    assert remembered[key][1] == hashlib.sha256(b"\1" * 4096).hexdigest()
    assert fingerprint_model(args(model), memo) == expected
    remembered[key][1] = "a digest that only the memo knows"
    memo.write_bytes(msgspec.json.encode(remembered))
    assert fingerprint_model(args(model), memo) != expected


@pytest.mark.usefixtures("files_settle_at_once")
def test_a_damaged_memo_is_ignored(model: Path, memo: Path) -> None:
    expected = fingerprint_model(args(model), memo)
    memo.write_text('{"half')
    assert fingerprint_model(args(model), memo) == expected


@pytest.mark.usefixtures("files_settle_at_once")
def test_the_memo_stays_bounded(tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MAX_MEMO_FILES", 4)
    for number in range(4):
        fingerprint_model(args(make_model(tmp_path / str(number))), memo)
    assert len(msgspec.json.decode(memo.read_bytes())) == 4


@pytest.mark.usefixtures("files_settle_at_once")
def test_threads_share_the_memo(tmp_path: Path, memo: Path) -> None:
    models = [make_model(tmp_path / str(number)) for number in range(8)]
    threads = [threading.Thread(target=fingerprint_model, args=(args(model), memo)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(msgspec.json.decode(memo.read_bytes())) == 8 * 3
    assert not list(memo.parent.glob(".fingerprints*"))


@pytest.mark.usefixtures("files_settle_at_once")
def test_a_full_disk_costs_the_memo_and_not_the_model(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = fingerprint_model(args(model), tmp_path / "elsewhere" / "memo.json")
    (tmp_path / "disk").mkdir()
    with mounted(tmp_path / "disk", 1 << 16) as disk:
        memo = disk / "memo.json"
        with full(disk):
            assert fingerprint_model(args(model), memo) == expected
            assert f"{memo} cannot be written" in caplog.text
            assert {path.name for path in disk.iterdir()} == {"filler", "memo.lock"}
        assert fingerprint_model(args(model), memo) == expected
        assert memo.exists()


@pytest.mark.usefixtures("files_settle_at_once")
def test_a_memo_that_is_no_file_costs_the_memo_and_not_the_model(model: Path, memo: Path) -> None:
    expected = fingerprint_model(args(model), memo)
    for path in memo.parent.iterdir():
        path.unlink()
    memo.mkdir()
    assert fingerprint_model(args(model), memo) == expected


def test_a_file_that_changes_while_it_is_read_is_read_again(
    model: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = model / "model.safetensors"
    read_digest = fingerprint._read_digest
    rewrites = iter([b"half", b"complete"])

    def read_then_rewrite(path: Path) -> str:
        digest = read_digest(path)
        if path == weights and (content := next(rewrites, None)):
            weights.write_bytes(content)
        return digest

    monkeypatch.setattr(fingerprint, "_read_digest", read_then_rewrite)
    torn = fingerprint_model(args(model), memo)
    assert weights.read_bytes() == b"complete"
    assert torn == fingerprint_model(args(model), memo)


def test_a_file_that_never_rests_is_refused(model: Path, memo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_digest = fingerprint._read_digest
    lock = threading.Lock()

    def read_then_grow(path: Path) -> str:
        digest = read_digest(path)
        with lock, path.open("ab") as file:
            file.write(b"more")
        return digest

    monkeypatch.setattr(fingerprint, "_read_digest", read_then_grow)
    with pytest.raises(InvalidRequest, match="being written"):
        fingerprint_model(args(model), memo)


@pytest.mark.usefixtures("files_settle_at_once")
def test_changed_models_are_found_without_reading(tmp_path: Path, memo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs: dict[str, ModelSpec] = {}
    for name in ("same", "touched", "gone", "overwritten"):
        folder = make_model(tmp_path / name)
        (folder / "config.json").write_text(f'{{"name": "{name}"}}')
        digest = fingerprint_model(args(folder), memo)
        specs[name] = ModelSpec(kind="hf", args=args(folder), fingerprint=digest)
    hub = ModelArgs(pretrained="someone/model", revision="abc")
    specs["hub"] = ModelSpec(kind="hf", args=hub, fingerprint=fingerprint_model(hub, memo))
    monkeypatch.setattr(fingerprint, "_read_digest", lambda path: pytest.fail(f"{path} is read"))
    assert changed_models(specs.values(), memo) == frozenset()
    os.utime(tmp_path / "touched" / "config.json", ns=(1, 1))
    (tmp_path / "gone" / "tokenizer.json").unlink()
    (tmp_path / "overwritten" / "model.safetensors").write_bytes(b"\2" * 4096)
    assert changed_models(specs.values(), memo) == {
        specs[name].replica_key for name in ("touched", "gone", "overwritten")
    }


def test_a_model_that_could_not_be_loaded_deserves_another_look_until_its_files_rest(
    model: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spec(fingerprint: str) -> ModelSpec:
        return ModelSpec(kind="hf", args=args(model), fingerprint=fingerprint)

    meant = fingerprint_model(args(model), memo)
    assert deserves_another_look(spec(meant), memo)  # it was written just now
    monkeypatch.setattr(fingerprint, "UNFINISHED_NS", 0)
    assert not deserves_another_look(spec(meant), memo)
    assert deserves_another_look(spec("what it was before"), memo)
    shutil.rmtree(model)
    assert deserves_another_look(spec(meant), memo)
