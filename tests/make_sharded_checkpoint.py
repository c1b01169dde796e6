"""Save a checkpoint as FSDP trainers do: `python make_sharded_checkpoint.py MODEL FOLDER rank-files|distcp`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

WORLD_SIZE = 2


def save(rank: int, model_folder: str, folder: str, layout: str) -> None:
    store = Path(folder, "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    mesh = dist.init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shards = Path(folder, "pytorch_model_fsdp_0")
    shards.mkdir(exist_ok=True)
    if layout == "distcp":
        dcp.save({"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(shards))
    else:
        torch.save(model.state_dict(), shards / f"model_world_size_{WORLD_SIZE}_rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(model: str, folder: str, layout: str) -> None:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    mp.spawn(save, (model, folder, layout), nprocs=WORLD_SIZE)
    Path(folder, "rendezvous").unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
