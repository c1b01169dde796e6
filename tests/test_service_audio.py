"""Models that hear in the running service: tiny ones, whose texts are those of transformers' own generate."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from evalpool_server import run_server
from service import Json, Service
from sounds import RATE, encoded, tone, wav

from gpu_pool.evaluator.task_index import LMMS_EVAL_ROOT
from server.client import EvalError

LENGTHS = (0.3, 1.0, 1.7, 2.0, 0.9, 0.4)
SOUNDS = [tone(seconds, seed) for seed, seconds in enumerate(LENGTHS)]
QUESTION = "What is this? <audio>Answer:"
NEW = 8
TASK: dict[str, Any] = {
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_audio": ["audio"],
    "doc_to_text": QUESTION,
    "doc_to_target": "{{text}}",
    "generation_kwargs": {"until": ["never"], "max_gen_toks": NEW, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder: Path, name: str, **config: Any) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **TASK, **config}, sort_keys=False))


def source(kind: str, path: Path) -> Json:
    return {"dataset_path": kind, "dataset_kwargs": {"data_files": {"test": str(path)}}}


def write_tasks(folder: Path) -> Path:
    """The sounds as paths beside JSON lines, as bytes in Parquet, as a folder; with damaged ones among them; a choice
    among texts, examples, and two sounds in a document."""
    (folder / "sounds").mkdir(parents=True)
    lines: list[str] = []
    for number, sound in enumerate(SOUNDS):
        (folder / "sounds" / f"{number}.wav").write_bytes(wav(sound))
        lines.append(json.dumps({"audio": f"sounds/{number}.wav", "text": "x"}))
    (folder / "listed.jsonl").write_text("\n".join(lines))
    write_task(folder, "listed", **source("json", folder / "listed.jsonl"))
    write_task(folder, "choice", **source("json", folder / "listed.jsonl"), output_type="multiple_choice")
    choice = yaml.safe_load((folder / "choice.yaml").read_text())
    choice |= {"doc_to_choice": [" Paris", " Question"], "doc_to_target": 0, "metric_list": [{"metric": "acc"}]}
    del choice["generation_kwargs"]
    (folder / "choice.yaml").write_text(yaml.safe_dump(choice))
    shots = {"fewshot_split": "test", "num_fewshot": 1}
    write_task(folder, "shot", **source("json", folder / "listed.jsonl"), **shots)
    (folder / "two.jsonl").write_text(json.dumps({"audio": "sounds/0.wav", "other": "sounds/2.wav", "text": "x"}))
    write_task(
        folder,
        "two",
        **source("json", folder / "two.jsonl"),
        doc_to_audio=["audio", "other"],
        doc_to_text="<audio> and <audio>",
    )
    files: list[bytes | None] = [encoded(sound, "flac", "flac") for sound in SOUNDS]
    write_parquet(folder / "stored.parquet", files)
    write_task(folder, "stored", **source("parquet", folder / "stored.parquet"))
    write_parquet(folder / "damaged.parquet", [*files, b"", b"<html>", files[0][:40] if files[0] else b"", None])
    write_task(folder, "damaged", **source("parquet", folder / "damaged.parquet"))
    write_task(folder, "folder", dataset_path="audiofolder", dataset_kwargs={"data_dir": str(folder / "sounds")})
    of_folder = yaml.safe_load((folder / "folder.yaml").read_text()) | {"test_split": "train", "doc_to_target": "x"}
    (folder / "folder.yaml").write_text(yaml.safe_dump(of_folder))
    write_task(folder, "samples", **source("parquet", folder / "stored.parquet"))
    (folder / "samples_utils.py").write_text(
        "def sounds(doc):\n"
        "    audio = doc['audio']\n"
        "    return [{'array': audio['array'], 'sampling_rate': audio['sampling_rate']}]\n"
    )
    of_samples = (
        (folder / "samples.yaml")
        .read_text()
        .replace("doc_to_audio:\n- audio", "doc_to_audio: !function samples_utils.sounds")
    )
    (folder / "samples.yaml").write_text(of_samples)
    return folder


def write_parquet(path: Path, files: list[bytes | None]) -> None:
    rows = [{"audio": file if file is None else {"bytes": file, "path": None}, "text": "x"} for file in files]
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text": datasets.Value("string"),
        }
    )
    data = datasets.Dataset.from_list(rows, features=features)
    data.cast_column("audio", datasets.Audio(sampling_rate=RATE)).to_parquet(path)


def write_librispeech(folder: Path) -> Path:
    """Local data with the columns of lmms-eval's task; gives the settings that say where."""
    folder.mkdir()
    rows = [
        {"audio": {"bytes": wav(sound), "path": None}, "gt": "paris", "source": "test", "task": "asr_en"}
        for sound in SOUNDS
    ]
    data = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(sampling_rate=RATE))
    data.to_parquet(folder / "librispeech_test_clean.parquet")
    root = f'"lmms-lab-audio/librispeech:librispeech_test_clean" = "{folder}"'
    (folder / "evalpool.toml").write_text(f"[dataset_roots]\n{root}\n")
    return folder / "evalpool.toml"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    """One CPU worker."""
    folder = tmp_path_factory.mktemp("box")
    settings = write_librispeech(folder / "librispeech")
    arguments = ("--config", settings, "--include-path", write_tasks(folder / "tasks"), "--cpu-workers", 1)
    with run_server(folder / "data", *arguments) as server, Service(server) as service:
        yield service


@pytest.fixture(scope="module")
def whisper(tiny_audio: Callable[[str], Path]) -> Path:
    return tiny_audio("whisper")


@pytest.fixture(scope="module")
def qwen(tiny_audio: Callable[[str], Path]) -> Path:
    return tiny_audio("qwen2_audio")


def answers_of(box: Service, job: Json, task: str) -> list[str]:
    samples = sorted(box.client.samples(job["job_id"], task), key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


@torch.inference_mode()
def written(folder: Path, sound: np.ndarray, most: int = NEW) -> str:
    """What a Whisper of transformers says of a sound, alone."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    inputs = processor(sound.astype(np.float32) / 32768, sampling_rate=RATE, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=most, num_beams=1)
    return processor.batch_decode(output, skip_special_tokens=True)[0]


@torch.inference_mode()
def said(folder: Path, text: str, *sounds: np.ndarray) -> str:
    """What a Qwen2-Audio of transformers says, alone."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder)
    heard = [sound.astype(np.float32) / 32768 for sound in sounds]
    inputs = processor(text=[text], audio=heard, sampling_rate=RATE, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_whisper_writes_down_what_transformers_does(box: Service, whisper: Path, batch_size: int | str) -> None:
    tasks = ("listed", "stored", "folder", "samples")
    job = box.finished(box.submit(whisper, *tasks, batch_size=batch_size, model_args={"dtype": "float32"}))
    expected = [written(whisper, sound) for sound in SOUNDS]
    assert len(set(expected)) > 1
    for task in tasks:
        assert answers_of(box, job, task) == expected


@pytest.mark.skipif(LMMS_EVAL_ROOT is None, reason="lmms-eval is not installed")
def test_a_task_of_lmms_eval(box: Service, whisper: Path, qwen: Path) -> None:
    job = box.finished(box.submit(whisper, "librispeech_test_clean", model_args={"dtype": "float32"}))
    full = 64 - 8  # what the decoder holds, but for what a text begins with
    texts = answers_of(box, job, "librispeech_test_clean")
    assert texts == [written(whisper, sound, full).split("\n\n")[0] for sound in SOUNDS]
    assert job["metrics"]["librispeech_test_clean"]["wer,none"] > 0
    job = box.finished(box.submit(qwen, "librispeech_test_clean", limit=2, model_args={"dtype": "float32"}))
    [first, *_] = box.client.samples(job["job_id"], "librispeech_test_clean")
    prompt = first["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("user:<|audio_bos|><|AUDIO|><|audio_eos|>Please recognize the speech")


def test_a_language_model_that_hears_says_what_transformers_does(box: Service, qwen: Path) -> None:
    place = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    job = box.finished(box.submit(qwen, "listed", "two", "shot", "choice", model_args={"dtype": "float32"}))
    plain = QUESTION.replace("<audio>", place)
    assert answers_of(box, job, "listed") == [said(qwen, plain, sound) for sound in SOUNDS]
    assert answers_of(box, job, "two") == [said(qwen, f"{place} and {place}", SOUNDS[0], SOUNDS[2])]
    assert job["metrics"]["choice"]["acc,none"] >= 0
    arguments = next(iter(box.client.samples(job["job_id"], "shot")))["arguments"]
    assert len(arguments["gen_args_0"]["arg_2"]["audio"]) == 2


def test_by_the_chat_template(box: Service, qwen: Path) -> None:
    options = {"apply_chat_template": True, "model_args": {"dtype": "float32"}}
    job = box.finished(box.submit(qwen, "listed", **options))
    place = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    text = f"user:{QUESTION.replace('<audio>', place)}assistant:"
    [first, *_] = box.client.samples(job["job_id"], "listed")
    assert first["arguments"]["gen_args_0"]["arg_0"] == text
    assert answers_of(box, job, "listed") == [said(qwen, text, sound) for sound in SOUNDS]


def test_a_sound_that_cannot_be_decoded_is_the_error_of_its_sample(box: Service, whisper: Path) -> None:
    job = box.finished(box.submit(whisper, "damaged", max_error_share=0.5, model_args={"dtype": "float32"}))
    assert job["metrics"]["damaged"]["evalpool_errored"] == 4
    samples = sorted(box.client.samples(job["job_id"], "damaged"), key=lambda sample: sample["doc_id"])
    causes = ["is empty", "cannot be decoded", "cannot be decoded|no samples", "the document has none"]
    for sample, cause in zip(samples[len(SOUNDS) :], causes, strict=True):
        assert any(one in sample["evalpool_error"] for one in cause.split("|")), sample["evalpool_error"]
    assert "sha256" in samples[0]["doc"]["audio"]


def test_what_a_model_lacks_is_refused(box: Service, whisper: Path, tiny_model: Path, qwen: Path) -> None:
    with pytest.raises(EvalError, match="listed cannot run: it plays sounds, and the model reads text only"):
        box.submit(tiny_model, "listed")
    with pytest.raises(EvalError, match="arc_easy cannot run: it plays no sounds, and the model writes down"):
        box.submit(whisper, "arc_easy")
    with pytest.raises(EvalError, match="its output_type is multiple_choice"):
        box.submit(whisper, "choice")
    with pytest.raises(
        EvalError, match="mmmu_val_art cannot run: it shows images, and the model reads text and sounds"
    ):
        box.submit(qwen, "mmmu_val_art")
    with pytest.raises(EvalError, match="must be one of transcribe, translate"):
        box.submit(whisper, "listed", model_args={"task": "sing"})
