"""A rank beside the worker's own: loads its shard of the model, then computes every chunk that rank 0 computes."""

from __future__ import annotations

import contextlib
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from gpu_pool.chunk_messages import RankReady
from gpu_pool.messages import LoadFailed, WorkerStart, encode
from gpu_pool.worker.computing import compute, in_short
from gpu_pool.worker.control import end_process
from gpu_pool.worker.engine.loading import load_model
from gpu_pool.worker.engine.shortage import is_out_of_memory
from gpu_pool.worker.rank_link import follow
from gpu_pool.worker.ranks import meet_ranks


def run_rank(connection: Connection, start: WorkerStart, rank: int) -> NoReturn:
    """Serve rank 0, at the other end of `connection`, until it is gone or lost."""

    def lost(reason: str) -> NoReturn:
        print(f"rank {rank} ends: {reason}", file=sys.stderr)
        end_process(1)

    torch.set_num_threads(start.threads_of_a_rank)
    with contextlib.suppress(EOFError, OSError):  # rank 0 is gone
        try:
            meet_ranks(start, rank)
            loaded = load_model(
                start.spec,
                allow_remote_code=start.allow_remote_code,
                ranks=start.tensor_parallel,
                budget=start.memory_bytes,
            )
        except Exception as error:
            traceback.print_exc()
            connection.send_bytes(encode(LoadFailed(error=in_short(error), out_of_memory=is_out_of_memory(error))))
            end_process(1)
        connection.send_bytes(encode(RankReady(memory_bytes=loaded.memory_bytes())))
        while True:
            follow(partial(compute, loaded), connection, lost)
    end_process(1)
