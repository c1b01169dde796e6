"""Which processes end by their mark: real ones."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid

from gpu_pool.offspring import VARIABLE, end_all

FAMILY = f"""
sleep 1000 & echo $!
"{sys.executable}" -c 'import sys; from gpu_pool.offspring import end_all; print(*end_all(sys.argv[1]))' "$1"
echo "$1" survived
"""


def test_whoever_ends_what_has_a_mark_spares_its_own_ancestors() -> None:
    mark = uuid.uuid4().hex
    environment = {**os.environ, VARIABLE: f"{mark}/child"}
    family = subprocess.run(["sh", "-c", FAMILY, "sh", mark], env=environment, stdout=subprocess.PIPE, text=True)
    sibling, ended, last = family.stdout.splitlines()
    assert ended == sibling
    assert last == f"{mark} survived"


def test_no_mark_is_nobodys() -> None:
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, VARIABLE: ""}) as sleeping:
        assert end_all("") == set()
        assert sleeping.poll() is None
        sleeping.kill()
