from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from gpu_pool.judge_keys import judge_keys
from gpu_pool.local_processes import LocalProcesses
from gpu_pool.settings import PoolSettings


def test_keys_are_told_by_their_names() -> None:
    names = ["OPENAI_API_KEY", "AZURE_API_KEY", "JUDGE_API_KEY", "AWS_BEARER_TOKEN_BEDROCK"]
    assert judge_keys([*names, "HF_TOKEN", "OPENAI_API_URL", "PATH"]) == set(names)


@pytest.mark.parametrize("allowed", [False, True])
async def test_no_process_finds_a_judges_key_without_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-judge")
    processes = LocalProcesses(PoolSettings(data_dir=tmp_path, allow_judges=allowed), lambda slot: slot)
    await processes.start()
    desk = await processes.desk("desk")

    async def ignore(_: Any) -> None:
        pass

    watching = desk.watch(ignore, ignore)
    while not (environment := Path(f"/proc/{desk.pid}/environ").read_bytes()):
        await asyncio.sleep(0)  # the kernel is still putting the new program together
    found = b"sk-of-the-judge" in environment
    desk.kill()
    await watching
    processes.close()
    assert found == allowed
