"""Trains under elastic torchrun, where nodes may leave and join during the run.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nnodes 1:2 --nproc-per-node 2 --max-restarts 3 --rdzv-backend c10d \\
        --rdzv-endpoint HOST:29500 --rdzv-id run-7 examples/cluster/elastic.py corpus/ --steps 100

torchrun starts all ranks again when their number changes. The global batch stays the same, so that
each rank takes a larger or a smaller part of it. The loader finds rank and number of ranks itself.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from forebay.torch import DataLoader, TokenDataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data")
parser.add_argument("--seq-len", type=int, default=128)
parser.add_argument("--global-batch", type=int, default=8, help="rows of all ranks at each step")
parser.add_argument("--steps", type=int, default=None, help="end of the run; default: the end of the epoch")
parser.add_argument("--state", type=Path, default=Path("elastic-state.json"), help="a file that all nodes see")
parser.add_argument("--delivery-log", type=Path, default=None, help="a folder for the proof of the run")
parser.add_argument("--seconds", type=float, default=0.0, help="a longer step, for tests")
options = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
assert options.global_batch % world_size == 0, "the number of ranks must divide the global batch"

loader = DataLoader(
    TokenDataset(options.data, seq_len=options.seq_len),
    batch_size=options.global_batch // world_size,
    shuffle=True,
    seed=0,
    drop_last=True,
    delivery_log=options.delivery_log,
)
step = 0
if options.state.exists():
    saved = json.loads(options.state.read_text())
    step = saved["step"]
    loader.load_state_dict(saved["loader"])
print(f"rank {rank} of {world_size} begins at step {step}", flush=True)

weight = torch.zeros(())
for batch in islice(loader, options.steps and max(0, options.steps - step)):
    # Stands for the model. The sum over all ranks keeps them in step.
    gradient = batch["input_ids"].double().mean().float()
    dist.all_reduce(gradient)
    weight -= 1e-6 * gradient
    step += 1
    time.sleep(options.seconds)
    if step % 5 == 0 and rank == 0:
        # A checkpoint of a model belongs into the same file.
        draft = options.state.with_suffix(".draft")
        draft.write_text(json.dumps({"step": step, "loader": loader.state_dict()}))
        os.replace(draft, options.state)
print(f"rank {rank} of {world_size} ends at step {step}", flush=True)
dist.destroy_process_group()
