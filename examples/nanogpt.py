"""Trains a small GPT from a `.bin` of uint16 ids, in the manner of nanoGPT.

    python examples/nanogpt.py train.bin                                   # one process
    torchrun --nproc-per-node 2 examples/nanogpt.py train.bin              # two ranks
    torchrun --nproc-per-node 2 examples/nanogpt.py train.bin --steps 40   # goes on at step 20

The ranks share the global batch of `--batch-size` rows. So a run may go on with another number of
ranks, and gets the same rows in the same order. Rank 0 stores one state of the loader for all.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from forebay.torch import DataLoader, TokenDataset
from model import GPT, GPTConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="a .bin of uint16 ids, as nanoGPT's prepare.py writes it")
    parser.add_argument("--out", type=Path, default=Path("out/nanogpt"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step, over all ranks")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=50_304)
    args = parser.parse_args()

    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if ranks > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)

    # The loader finds rank and number of ranks in torchrun's environment.
    dataset = TokenDataset(args.data, bin_dtype=np.uint16, seq_len=args.seq_len)
    loader = DataLoader(dataset, batch_size=args.batch_size // ranks, shuffle=True, seed=0, epochs="endless")
    module = GPT(GPTConfig(args.vocab_size, args.seq_len, layers=2, heads=2, width=32, dropout=0.0)).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

    args.out.mkdir(parents=True, exist_ok=True)
    path, first = args.out / "checkpoint.pt", 0
    if path.exists():
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        loader.load_state_dict(checkpoint["loader"])
        first = checkpoint["step"]
    model = DistributedDataParallel(module) if ranks > 1 else module

    batches = iter(loader)
    for step in range(first, args.steps):
        batch = next(batches)
        loss = model(batch["input_ids"].to(device), batch["labels"].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        print(
            f"rank {rank} step {step} loss {loss.item():.3f} first ids {batch['input_ids'][:, 0].tolist()}", flush=True
        )

    if rank == 0:
        states = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
        torch.save({**states, "step": args.steps}, path)
        print(loader.verdict())
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
