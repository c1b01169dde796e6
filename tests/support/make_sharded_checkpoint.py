"""Train a model under FSDP2 and save it as trainers do: `python make_sharded_checkpoint.py MODEL DISTCP RANK_FILES`.

DISTCP and RANK_FILES are the folders for the two layouts. Beside each, a file with its name and `.safetensors` holds
the `tokens` of a batch, and the logits that the trained model (`regular`) and the moving average of its weights (`ema`)
give for it, as the ranks computed them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

WORLD_SIZE = 2
STEPS = 3
DECAY = 0.5
FOLDERS = {"regular": "pytorch_model_fsdp_0", "ema": "pytorch_ema_model_fsdp_0"}


def train_and_save(rank: int, model_folder: str, distcp: str, rank_files: str) -> None:
    store = Path(distcp, "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    mesh = dist.init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        model(input_ids=tokens[rank::WORLD_SIZE], labels=tokens[rank::WORLD_SIZE]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in model.state_dict().items():
            average[name].lerp_(value.detach(), 1 - DECAY)
    trained = {name: value.detach().clone() for name, value in model.state_dict().items()}
    expected = {"tokens": tokens}
    for kind, weights in (("regular", trained), ("ema", average)):
        for folder in (distcp, rank_files):
            Path(folder, FOLDERS[kind]).mkdir(exist_ok=True)
        parts = {"model": weights} | ({"optimizer": optimizer.state_dict()} if kind == "regular" else {})
        dcp.save(parts, storage_writer=dcp.FileSystemWriter(Path(distcp, FOLDERS[kind])))
        torch.save(weights, Path(rank_files, FOLDERS[kind], f"model_world_size_{WORLD_SIZE}_rank_{rank}.pt"))
        model.load_state_dict(weights)
        with torch.no_grad():
            expected[kind] = model(input_ids=tokens).logits.contiguous()
    if rank == 0:
        for folder in (distcp, rank_files):
            save_file(expected, f"{folder}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def main(model: str, distcp: str, rank_files: str) -> None:
    for folder in (distcp, rank_files):
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    mp.spawn(train_and_save, (model, distcp, rank_files), nprocs=WORLD_SIZE)
    Path(distcp, "rendezvous").unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
