"""The description of the machine: true to what the system says, and complete in JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from fake_nvml import FakeNvml, gpu_line
from machine import ROOT, describe_machine

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_it_says_what_the_system_says() -> None:
    machine = describe_machine()
    assert machine.python == platform.python_version()
    assert machine.packages == {name: metadata.version(name) for name in ("torch", "transformers", "lm-eval")}
    assert machine.cores == len(os.sched_getaffinity(0))
    total_kib = int(Path("/proc/meminfo").read_text().split()[1])
    assert abs(machine.memory_gib - total_kib / 1024**2) < 0.1
    assert abs(datetime.now(UTC) - datetime.fromisoformat(machine.date)).total_seconds() < 180


def test_the_commit_is_that_of_the_repository() -> None:
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    commit = describe_machine().commit.removesuffix("+")
    assert head.startswith(commit) if head else commit == "unknown"


def test_all_of_it_is_in_the_text_and_in_json() -> None:
    machine = describe_machine()
    text = str(machine)
    assert machine.cpu in text
    assert machine.commit in text
    assert f"{machine.cores} cores" in text
    assert machine.packages["torch"] in text
    written = json.loads(json.dumps(dataclasses.asdict(machine)))
    assert written["cpu"] == machine.cpu
    assert tuple(written["gpus"]) == machine.gpus


def test_gpus_are_those_of_nvml_and_torch_is_not_loaded(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(gpu_line(), gpu_line(total_mib=40960, name="Fake_A100_40GB"))
    code = "import json, machine, sys; print(json.dumps([machine.describe_machine().gpus, 'torch' in sys.modules]))"
    environment = fake_nvml.environment(PYTHONPATH=os.pathsep.join([str(SCRIPTS), str(ROOT)]))
    printed = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, env=environment).stdout
    assert json.loads(printed) == [["Fake H100 80GB, 80 GiB", "Fake A100 40GB, 40 GiB"], False]
