"""Which processes end by their mark: real ones."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import uuid

import pytest

from gpu_pool.offspring import VARIABLE, end_all, mark_process

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


def test_the_limit_alone_tells_whose_a_process_is() -> None:
    server, child, other = (uuid.uuid4().hex for _ in range(3))
    with subprocess.Popen(["sleep", "1000"], env={}, start_new_session=True) as sleeping:
        mark_process(sleeping.pid, f"{server}/{child}")
        assert end_all(f"{server}/{other}") == end_all(f"{other}/{child}") == end_all(other) == set()
        assert sleeping.poll() is None
        assert end_all(server) == {sleeping.pid}
        assert sleeping.wait() == -signal.SIGKILL


def test_a_process_whose_limit_may_not_be_raised_stays_as_it_is() -> None:
    with subprocess.Popen(["sleep", "1000"], env={}) as sleeping:
        resource.prlimit(sleeping.pid, resource.RLIMIT_RTTIME, (10_000, 20_000))
        mark_process(sleeping.pid, "server/child")
        assert resource.prlimit(sleeping.pid, resource.RLIMIT_RTTIME) == (10_000, 20_000)
        assert end_all("server") == set()
        sleeping.kill()
    mark_process(sleeping.pid, "server/child")  # gone: nothing to mark


ELSEWHERE = (
    "import sys; from gpu_pool.offspring import end_all, proc_is_ours; print(proc_is_ours(), *end_all(sys.argv[1]))"
)


@pytest.mark.parametrize(("mounted", "ends"), [([], False), (["--mount-proc"], True)])
def test_nothing_is_ended_by_the_numbers_of_another_namespace(mounted: list[str], ends: bool) -> None:
    unshare = ["unshare", "--pid", "--fork", *mounted]
    if subprocess.run([*unshare, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("namespaces may not be made here")
    mark = uuid.uuid4().hex
    environment = {**os.environ, VARIABLE: f"{mark}/child"}
    family = f"""sleep 1000 & "{sys.executable}" -c '{ELSEWHERE}' {mark}; kill $! 2>/dev/null && echo alive"""
    ran = subprocess.run([*unshare, "sh", "-c", family], env=environment, stdout=subprocess.PIPE, text=True)
    first, *alive = ran.stdout.splitlines()
    assert first.split()[0] == str(ends)
    assert len(first.split()) == (2 if ends else 1)
    assert alive == ([] if ends else ["alive"])
