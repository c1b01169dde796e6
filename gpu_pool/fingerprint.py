"""A model is its content: one digest over every file that defines it, each file read once as long as it is unchanged.

Digests are memoised by what the kernel says of a file (device, inode, size, mtime_ns, ctime_ns). ctime cannot be set
by a program, but its clock is coarse: a file written twice within one tick looks unchanged. As git does for its index,
a digest is therefore kept only when the file was already `SETTLED_NS` old before it was read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from gpu_pool.daemon_thread import map_in_daemon_threads
from gpu_pool.errors import InvalidRequest
from gpu_pool.file_lock import alone
from gpu_pool.records import ModelArgs, ModelSpec
from gpu_pool.whole_file import replace_file

SETTLED_NS = 2_000_000_000
"""Longest clock tick of a file system we expect (FAT and some network file systems: 2 s)."""
UNFINISHED_NS = 10_000_000_000
"""How long files must have rested that cannot be loaded, before that is held against them."""
MAX_MEMO_FILES = 10_000
READ_ATTEMPTS = 4
"""Times a folder is read before we say that somebody is still writing to it."""

_LIGHT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken", ".spm", ".vocab", ".bpe")
"""What a folder of someone else's files may add to a model: configuration, tokenizer, chat template, code."""
_OTHER_FRAMEWORKS = (".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".mlmodel")
_TRAINING_FILES = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "training_args", "events.out.")
_DOCUMENT_SUFFIXES = (".md", ".log", ".png", ".jpg", ".pdf", ".lock", ".tmp", ".incomplete")

_HUB = "hub:"
"""What identities of models begin with whose weights are known by hub id and commit."""

logger = logging.getLogger(__name__)
FileState = tuple[int, int, int, int, int]
"""(device, inode, size, mtime_ns, ctime_ns)"""


class _Known(msgspec.Struct, frozen=True, array_like=True):
    """The digest of one file, with the state that it was read in and when it was last useful (epoch seconds)."""

    state: FileState
    digest: str
    used: int


def memo_path(data_dir: Path) -> Path:
    """The file in a data folder that keeps the digests of files that were read."""
    return data_dir / "fingerprints.json"


def is_of_hub(fingerprint: str) -> bool:
    """Whether the weights are known by hub id and commit: their files need not be where `pretrained` says."""
    return fingerprint.startswith(_HUB)


def changed_models(specs: Iterable[ModelSpec], memo: Path) -> frozenset[str]:
    """Replica keys of the models whose files are not what they were. Nothing is read: the unknown counts as such."""
    models = {spec.replica_key: spec for spec in specs if spec.api is None}
    return frozenset(key for key, spec in models.items() if not is_current(spec, memo, read=False))


def is_current(spec: ModelSpec, memo: Path, *, read: bool = True) -> bool:
    """Whether the files are those that were meant; not where they are gone, unreadable or being written."""
    try:
        return fingerprint_model(spec.args, memo, read=read) == spec.fingerprint
    except (InvalidRequest, OSError):
        return False


def deserves_another_look(spec: ModelSpec, memo: Path) -> bool:
    """Whether a model that could not be loaded is not, or may not be, what was meant: its files are others, or gone, or
    were written so lately that more may be to come."""
    if not is_current(spec, memo):
        return True
    written_ns = max((state[4] for state in model_state(spec.args).values()), default=0)
    return time.time_ns() - written_ns < UNFINISHED_NS


def model_state(args: ModelArgs) -> dict[Path, FileState]:
    """What the kernel says of each local file that defines the model, of those that are there. Nothing is read."""
    found: dict[Path, FileState] = {}
    try:
        folders = [_folder_files(Path(folder)) for folder in (args.peft, args.tokenizer) if folder]
        for path in {path for files in (model_files(args), *folders) for path in files.values()}:
            found[path] = _state(path.stat())
    except OSError:  # it goes away just now
        return {}
    return found


def fingerprint_model(args: ModelArgs, memo: Path, *, read: bool = True) -> str:
    """The identity of the model that `args` names, by content (or by hub id and commit: then nothing is read).

    `args.revision` of a hub id must already be a commit, and adapter and tokenizer local
    (`gpu_pool.models.resolve_hub_revision`).

    Raises:
        InvalidRequest: a file cannot be read, or keeps changing while it is read; without `read`, it would have to be.
    """
    base = Path(args.pretrained)
    parts: dict[str, Path] = {}
    hub = ""
    if base.exists():
        parts |= {f"model/{name}": path for name, path in model_files(args).items()}
    else:
        hub = _hub_identity(args)
    if args.peft:
        parts |= {f"peft/{name}": path for name, path in _folder_files(_existing("peft", args.peft)).items()}
    if args.tokenizer:
        tokenizer = _light_files(_existing("tokenizer", args.tokenizer))
        parts |= {f"tokenizer/{name}": path for name, path in tokenizer.items()}
    if not parts:
        return hub
    content = _digest_files(parts, _Memo(memo, read=read))
    return f"{hub}+{content}" if hub else content


def model_files(args: ModelArgs) -> dict[str, Path]:
    """The files under the local folder (or of the local GGUF file) `args.pretrained` that define the model, by name."""
    base = Path(args.pretrained)
    if base.is_file():
        return {"model.gguf": base} | _light_files(base.parent)
    if args.gguf_file:
        return _light_files(base) | {args.gguf_file: base / args.gguf_file}
    if args.subfolder:
        inner = _folder_files(base / args.subfolder)
        return _light_files(base) | {f"{args.subfolder}/{name}": path for name, path in inner.items()}
    return _folder_files(base)


def _existing(key: str, path: str) -> Path:
    """A part that is not there must not be left out of the identity without a word."""
    if not os.path.exists(path):
        raise InvalidRequest(f"model_args.{key}", f"{path} does not exist on the server")
    return Path(path)


def _hub_identity(args: ModelArgs) -> str:
    inside = "/".join(part for part in (args.subfolder, args.gguf_file) if part)
    return f"{_HUB}{args.pretrained}@{args.revision}" + (f":{inside}" if inside else "")


def _folder_files(folder: Path) -> dict[str, Path]:
    """Everything in `folder` that transformers may load: a file too many costs a read, one too few a wrong score."""
    if folder.is_file():
        return {folder.name: folder}
    files = {path.name: path for path in _plain_files(folder) if _may_define_model(path.name.lower())}
    for index in [path for name, path in files.items() if name.endswith(".index.json")]:
        files |= {name: folder / name for name in indexed_shards(index) if (folder / name).is_file()}
    templates = folder / "additional_chat_templates"
    return files | {f"{templates.name}/{path.name}": path for path in _plain_files(templates)}


def _light_files(folder: Path) -> dict[str, Path]:
    return {name: path for name, path in _folder_files(folder).items() if name.lower().endswith(_LIGHT_SUFFIXES)}


def _plain_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


def _may_define_model(name: str) -> bool:
    return not (
        name.endswith((".gguf", *_OTHER_FRAMEWORKS, *_DOCUMENT_SUFFIXES))  # a GGUF file counts where it is named
        or name.startswith(_TRAINING_FILES)
    )


def indexed_shards(index: Path) -> set[str]:
    """Names of the weight files that an index lists; they may lie in folders below it."""
    try:
        weight_map = msgspec.json.decode(index.read_bytes())["weight_map"]
        return {str(name) for name in weight_map.values()}
    except (OSError, msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return set()


def _digest_files(parts: dict[str, Path], memo: _Memo) -> str:
    """sha256 over the names and digests of `parts`, none of which changed until the last was read."""
    for _ in range(READ_ATTEMPTS):
        try:
            states = {path: _state(path.stat()) for path in set(parts.values())}
            digests = memo.digests(states)
            unchanged = all(_state(path.stat()) == state for path, state in states.items())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InvalidRequest("model", f"{error.filename} cannot be read: {error.strerror}") from error
        if unchanged:
            lines = (f"{name}\0{digests[path]}\n" for name, path in sorted(parts.items()))
            return hashlib.sha256("".join(lines).encode()).hexdigest()
    raise InvalidRequest("model", "its files are being written; submit again when the checkpoint is complete")


def _state(result: os.stat_result) -> FileState:
    return (result.st_dev, result.st_ino, result.st_size, result.st_mtime_ns, result.st_ctime_ns)


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InvalidRequest("model", f"{path} is not a regular file")
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Memo:
    """Digests of settled files, in one JSON file that several processes and threads share."""

    def __init__(self, path: Path, *, read: bool) -> None:
        """Without `read`, what is not known is refused."""
        self._path = path
        self._may_read = read

    def digests(self, states: dict[Path, FileState]) -> dict[Path, str]:
        """The digest of each file, read from the disk where the memo does not know its state."""
        started_ns = time.time_ns()
        known = self._load()
        found = {path: entry.digest for path, state in states.items() if (entry := _lookup(known, state))}
        missing = [path for path in states if path not in found]
        if missing and not self._may_read:
            raise InvalidRequest("model", f"{missing[0]} has not been read since it was written")
        read = map_in_daemon_threads(_read_digest, missing, min(8, os.cpu_count() or 1))
        settled = {path: digest for path, digest in read.items() if started_ns - states[path][4] > SETTLED_NS}
        if settled:
            used = started_ns // 1_000_000_000
            trusted = found | settled
            self._remember({_key(states[path]): _Known(states[path], trusted[path], used) for path in trusted})
        return found | read

    def _load(self) -> dict[str, _Known]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, _Known])
        except (OSError, msgspec.DecodeError):  # none yet, or not ours: the files are simply read again
            return {}

    def _remember(self, entries: dict[str, _Known]) -> None:
        """Keep them, where that is possible: what is not kept costs another read, and no job."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with alone(self._path):
                merged = self._load() | entries
                newest = sorted(merged.items(), key=lambda item: item[1].used, reverse=True)[:MAX_MEMO_FILES]
                replace_file(self._path, msgspec.json.encode(dict(newest)))
        except OSError as error:
            logger.warning("%s cannot be written, and files will be read again: %s", self._path, error)


def _key(state: FileState) -> str:
    return f"{state[0]}:{state[1]}"


def _lookup(known: dict[str, _Known], state: FileState) -> _Known | None:
    entry = known.get(_key(state))
    return entry if entry is not None and entry.state == state else None
