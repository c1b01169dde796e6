"""The inventory through the real NVML binding, on a fake library that scripts the hardware."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO

import msgspec
import pytest
from fake_nvml import FakeNvml, gpu_line, gpu_uuid, mig_uuid

from gpu_pool.hardware import Gpu

GIB = 1024**3
MIB = 1024**2
PROCESSES = "nvmlDeviceGetComputeRunningProcesses_v3"


class Look(msgspec.Struct):
    gpus: tuple[Gpu, ...]
    reason: str | None

    @property
    def indices(self) -> list[str]:
        return [gpu.index for gpu in self.gpus]


# The dynamic linker reads LD_LIBRARY_PATH when a process starts, so each look is made in a child. It looks once when it
# opens the inventory and once more for each line it is sent.
CHILD = """
import sys, msgspec
from gpu_pool.gpus import Inventory
inventory = Inventory.open()
for line in sys.stdin:
    look = {"gpus": inventory.gpus(), "reason": inventory.reason}
    print(msgspec.json.encode(look).decode(), flush=True)
"""


@contextlib.contextmanager
def looking(environment: dict[str, str]) -> Iterator[Callable[[], Look]]:
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:

        def look(stdin: IO[str] | None = child.stdin, stdout: IO[str] | None = child.stdout) -> Look:
            assert stdin is not None
            assert stdout is not None
            stdin.write("look\n")
            stdin.flush()
            return msgspec.json.decode(stdout.readline(), type=Look)

        yield look


def look_once(machine: FakeNvml, **environment: str) -> Look:
    with looking(machine.environment(**environment)) as look:
        return look()


def test_without_the_library_there_are_no_gpus_and_a_reason(fake_nvml: FakeNvml) -> None:
    look = look_once(fake_nvml, LD_LIBRARY_PATH=str(fake_nvml.folder))
    assert look.gpus == ()
    assert "NVML Shared Library Not Found" in (look.reason or "")


@pytest.mark.parametrize(("code", "said"), [(9, "Driver Not Loaded"), (4, "Insufficient Permissions"), (999, "999")])
def test_a_driver_that_refuses_is_a_reason(fake_nvml: FakeNvml, code: int, said: str) -> None:
    fake_nvml.write(gpu_line(), f"error nvmlInitWithFlags {code}")
    look = look_once(fake_nvml)
    assert look.gpus == ()
    assert said in (look.reason or "")


def test_a_driver_without_gpus_is_a_reason(fake_nvml: FakeNvml) -> None:
    assert look_once(fake_nvml) == Look((), "No GPU can be used: the driver shows none.")


def test_gpus_are_listed_in_order_with_memory_load_and_processes(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(
        gpu_line(used_mib=100, utilization=7, temperature=41),
        gpu_line(name="Other"),
        "proc 1 4321 2048",
        "proc 1 55 -1",
    )
    look = look_once(fake_nvml)
    assert look == Look(
        (
            Gpu(
                uuid=gpu_uuid(0),
                index="0",
                name="Fake H100 80GB",
                total_bytes=80 * GIB,
                free_bytes=80 * GIB - 100 * MIB,
                visible_device="0",
                utilization_percent=7,
                temperature_celsius=41,
            ),
            Gpu(
                uuid=gpu_uuid(1),
                index="1",
                name="Other",
                total_bytes=80 * GIB,
                free_bytes=78 * GIB,
                visible_device="1",
                processes=((4321, 2 * GIB), (55, 0)),
                utilization_percent=0,
                temperature_celsius=30,
            ),
        ),
        None,
    )


def test_mig_instances_stand_in_for_their_gpu(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(
        gpu_line(), gpu_line(mig=True, temperature=50), "mig 1 0 20480 0", "mig 1 3 40960 0", "migproc 1 3 77 1024"
    )
    whole, first, second = look_once(fake_nvml).gpus
    assert (whole.index, whole.visible_device) == ("0", "0")
    assert (first.index, first.uuid, first.visible_device) == ("1:0", mig_uuid(1, 0), mig_uuid(1, 0))
    assert (first.total_bytes, first.free_bytes, first.processes) == (20 * GIB, 20 * GIB, ())
    assert (first.temperature_celsius, first.utilization_percent) == (50, None)
    assert (second.index, second.total_bytes, second.free_bytes) == ("1:3", 40 * GIB, 39 * GIB)
    assert second.processes == ((77, GIB),)


@pytest.mark.parametrize("code", [2, 6])
@pytest.mark.parametrize("function", ["nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo", PROCESSES])
def test_an_instance_that_is_destroyed_under_the_look_takes_no_other_along(
    fake_nvml: FakeNvml, code: int, function: str
) -> None:
    fake_nvml.write(gpu_line(mig=True), "mig 0 0 20480 0", "mig 0 1 20480 0", f"error {function} {code} 0 0")
    (left,) = look_once(fake_nvml).gpus
    assert (left.index, left.problem, left.lost) == ("0:1", None, False)


def test_a_lost_gpu_is_named_and_hides_no_other(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(gpu_line(), gpu_line(), gpu_line())
    with looking(fake_nvml.environment()) as look:
        assert [gpu.problem for gpu in look().gpus] == [None, None, None]
        fake_nvml.write(gpu_line(), gpu_line(), gpu_line(), "error * 15 1")
        lost = look().gpus
        fake_nvml.write(gpu_line(), gpu_line(), gpu_line())
        back = look().gpus
    assert [gpu.uuid for gpu in lost] == [gpu_uuid(0), gpu_uuid(1), gpu_uuid(2)]
    assert [gpu.problem for gpu in lost] == [None, "NVML cannot read it: GPU is lost (NVML error 15).", None]
    assert [gpu.lost for gpu in lost] == [False, True, False]
    # CUDA may not count the lost one, so its numbers are not NVML's: the others are named by UUID
    assert [gpu.visible_device for gpu in lost] == [gpu_uuid(0), gpu_uuid(1), gpu_uuid(2)]
    assert [gpu.visible_device for gpu in back] == ["0", "1", "2"]
    assert [gpu.problem for gpu in back] == [None, None, None]


def test_a_gpu_that_was_never_readable_is_listed_too(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(gpu_line(), gpu_line(), "error nvmlDeviceGetHandleByIndex_v2 4 0")
    look = look_once(fake_nvml)
    assert [gpu.problem is None for gpu in look.gpus] == [False, True]
    assert "Insufficient Permissions" in (look.gpus[0].problem or "")


@pytest.mark.parametrize("code", [3, 4])
def test_what_the_driver_hides_is_left_out(fake_nvml: FakeNvml, code: int) -> None:
    hidden = [PROCESSES, "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature", "nvmlDeviceGetMigMode"]
    fake_nvml.write(gpu_line(), "proc 0 9 1024", *(f"error {name} {code}" for name in hidden))
    (gpu,) = look_once(fake_nvml).gpus
    assert (gpu.processes, gpu.utilization_percent, gpu.temperature_celsius) == ((), None, None)
    assert (gpu.problem, gpu.free_bytes) == (None, 79 * GIB)


def test_many_processes_are_all_listed_and_a_list_that_keeps_growing_is_a_problem(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(gpu_line(), gpu_line(), *(f"proc 0 {pid} 1" for pid in range(1, 201)), f"error {PROCESSES} 7 1")
    many, growing = look_once(fake_nvml).gpus
    assert [pid for pid, _ in many.processes] == list(range(1, 201))
    assert "Insufficient Size" in (growing.problem or "")


def test_a_driver_that_goes_and_comes_back_is_followed(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(gpu_line(), "error nvmlInitWithFlags 9")
    with looking(fake_nvml.environment()) as look:
        assert look().gpus == ()
        fake_nvml.write(gpu_line(), gpu_line())
        assert look().indices == ["0", "1"]
        fake_nvml.write("error * 9")
        gone = look()
        assert gone.gpus == ()
        assert "Driver Not Loaded" in (gone.reason or "")
        fake_nvml.write(gpu_line(), "proc 0 12 1024")
        back = look()
    assert back.reason is None
    assert [gpu.processes for gpu in back.gpus] == [((12, GIB),)]


def test_a_driver_that_goes_between_two_gpus_is_no_problem_of_a_gpu(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(gpu_line(), gpu_line(), "error nvmlDeviceGetMemoryInfo 1 1")
    look = look_once(fake_nvml)
    assert look.gpus == ()
    assert "Uninitialized" in (look.reason or "")


MIXED = [*[gpu_line()] * 3, gpu_line(mig=True), "mig 3 0 20480 0", "mig 3 1 20480 0"]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("0,2", ["0", "2"]),
        (" 2 , 1 ", ["1", "2"]),
        ("1,1", ["1"]),
        ("", []),
        ("-1", []),
        ("0,-1,2", ["0"]),
        ("7,0", []),
        ("NoDevFiles", []),
        (gpu_uuid(1), ["1"]),
        (f"{gpu_uuid(2)},0", ["0", "2"]),
        ("GPU-fa4e", []),
        ("GPU-beef,0", []),
        (mig_uuid(3, 1), ["3:1"]),
        (f"0,{mig_uuid(3, 0)}", ["0", "3:0"]),
        ("3", ["3:0", "3:1"]),
        (gpu_uuid(3), ["3:0", "3:1"]),
    ],
)
def test_an_inherited_cuda_visible_devices_is_the_set_we_may_use(
    fake_nvml: FakeNvml, visible: str, indices: list[str]
) -> None:
    fake_nvml.write(*MIXED)
    look = look_once(fake_nvml, CUDA_VISIBLE_DEVICES=visible)
    assert look.indices == indices
    # What a child is given names the GPU among all of the machine, not among the visible ones.
    assert [gpu.visible_device for gpu in look.gpus] == [
        gpu.uuid if ":" in gpu.index else gpu.index for gpu in look.gpus
    ]
    assert (look.reason is None) == bool(indices)
    if not indices:
        assert f"CUDA_VISIBLE_DEVICES='{visible}'" in (look.reason or "")


def test_a_short_uuid_will_do(fake_nvml: FakeNvml) -> None:
    fake_nvml.write(gpu_line())
    assert look_once(fake_nvml, CUDA_VISIBLE_DEVICES="GPU-fa4e").indices == ["0"]
