"""`evalpool serve` for a box whose GPUs are those of the fake NVML library, with workers that need no real ones.

It looks at the hardware more often than the service does, and gives up sooner on a driver that hangs: tests wait for
both.
"""

LOOK_EVERY_SECONDS = 0.25
LOOK_SECONDS = 5.0

if __name__ == "__main__":
    from gpu_worker import gpu_worker_main

    from gpu_pool import gpu_watch, local_processes, pool
    from server.__main__ import main

    pool.LOOK_SECONDS = LOOK_EVERY_SECONDS
    gpu_watch.LOOK_SECONDS = LOOK_SECONDS
    local_processes.worker_main = gpu_worker_main
    main()
