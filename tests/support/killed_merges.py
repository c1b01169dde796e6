"""Kill a merge before each of its operations on files in turn: `python killed_merges.py CHECKPOINT OUTPUT EARLIER`.

CHECKPOINT and OUTPUT are folders; EARLIER is a kind that was merged into OUTPUT before, or "none". For each kill prints
a line of JSON: the operation, and what OUTPUT holds then: "nothing", "regular", "ema" or "a mixture". After each kill
the merge runs again to its end, which a line of JSON says, too.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

from safetensors.numpy import load_file

from gpu_pool.checkpoints import check_checkpoint
from gpu_pool.errors import InvalidRequest
from gpu_pool.merge import MARK, is_merged, plan_merge, staging_folder
from gpu_pool.records import CheckpointType, Merge
from gpu_pool.worker.merging.merging import merge

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
SHARD_BYTES = {"regular": 200_000, "ema": 10**9}
"""Several files of the one, one of the other."""


def plan(checkpoint: Path, output: Path, kind: CheckpointType) -> Merge:
    return plan_merge(checkpoint, output, kind, (output.parent,), max_shard_bytes=SHARD_BYTES[kind])


def run(work: Merge, fatal: int | None) -> str | None:
    """Merge in a fork that ends before its operation number `fatal`; returns that, None when it came to its end."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        numbers = itertools.count()

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or is_write) and next(numbers) == fatal:
                os.write(theirs, f"{event} {Path(str(arguments[0])).name}".encode())
                os._exit(9)

        sys.addaudithook(hook)
        merge(work, staging_folder(work, "job"), lambda _: None)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return said or None


def content(folder: Path) -> dict[str, bytes] | None:
    """The tensors that can be loaded from it; None where it is no checkpoint."""
    try:
        check_checkpoint(folder, "model")
    except (InvalidRequest, OSError):
        return None
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return {name: value.tobytes() for name, value in load_file(single).items()}
    where = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(where.values())}
    return {name: files[file][name].tobytes() for name, file in where.items()}


def main(checkpoint: Path, output: Path, earlier: str) -> None:
    known: dict[str, dict[str, bytes] | None] = {"nothing": None}
    for kind in ("regular", "ema"):
        run(plan(checkpoint, output.parent / kind, kind), None)
        known[kind] = content(output.parent / kind)
    for number in itertools.count():
        if output == checkpoint:
            for path in (*output.glob("*.safetensors*"), output / MARK):
                path.unlink(missing_ok=True)
        else:
            shutil.rmtree(output, ignore_errors=True)
        if earlier != "none":
            run(plan(checkpoint, output, earlier), None)  # pyright: ignore[reportArgumentType]
        work = plan(checkpoint, output, "regular")
        killed_before = run(work, number)
        holds = content(output)
        name = next((name for name, expected in known.items() if expected == holds), "a mixture")
        run(work, None)
        again = content(output) == known["regular"] and is_merged(work) and not staging_folder(work, "job").exists()
        print(json.dumps({"before": killed_before, "holds": name, "whole_again": again}), flush=True)
        if killed_before is None:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
