"""`evalpool serve` for a box whose GPUs are those of the fake NVML library, with workers that need no real ones.

It looks at the hardware more often than the service does, and gives up sooner on a driver that hangs: tests wait for
both. With FAKE_CONTAINER in its environment it takes itself to be in a process namespace of its own.
"""

import os

LOOK_EVERY_SECONDS = 0.25
LOOK_SECONDS = 5.0

if __name__ == "__main__":
    from gpu_worker import gpu_worker_main

    from gpu_pool import gpu_watch, gpus, local_processes, pool, process_table
    from server.__main__ import main

    pool.LOOK_SECONDS = LOOK_EVERY_SECONDS
    gpu_watch.LOOK_SECONDS = gpus.OPEN_SECONDS = LOOK_SECONDS
    if "FAKE_CONTAINER" in os.environ:
        process_table._in_pid_namespace = lambda proc: True
    local_processes.worker_main = gpu_worker_main
    main()
