"""Trains a small GPT from token shards. A run that is killed resumes exactly.

    python examples/train_gpt.py out/demo/parquet --out out/run --steps 160

A checkpoint holds the model, the optimizer, the random states and the loader's state. A second
start continues from the newest checkpoint. Each step appends a line to `steps.jsonl`: its number,
the loss, and the SHA-256 of its batch.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from forebay.torch import DataLoader, TokenDataset
from model import GPT, GPTConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="file, folder or glob of Parquet or Arrow shards")
    parser.add_argument(
        "--out", type=Path, default=Path("out/run"), help="checkpoint and step log (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--checkpoint-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-workers", type=int, default=0, help="loader threads; 0 takes the default number")
    parser.add_argument("--torch-threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def save_atomically(checkpoint: dict, path: Path) -> None:
    """Saves a checkpoint. A process that is killed meanwhile leaves the previous one whole."""
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def batch_digest(batch: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in ("input_ids", "labels"):
        digest.update(batch[name].numpy().tobytes())
    return digest.hexdigest()


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warms up linearly over a tenth of the run, then follows a cosine to a tenth of the peak."""
    warm_up = max(1, args.steps // 10)
    if step < warm_up:
        return args.learning_rate * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, args.steps - warm_up)
    return args.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def timed_batches(loader: DataLoader, step: int) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """Yields each batch after `step` steps, epoch after epoch, and the seconds waited for it."""
    for epoch in itertools.count(step // len(loader)):
        loader.set_epoch(epoch)
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            yield batch, time.perf_counter() - asked


def main() -> None:
    args = arguments()
    # Every run gives the same numbers, by fixed seeds and threads, and by kernels that add in a
    # fixed order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(args.torch_threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)

    dataset = TokenDataset(args.data, seq_len=args.seq_len)
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        seed=args.seed,
        drop_last=True,
        num_workers=args.num_workers,
        pin_memory=args.device.startswith("cuda"),
    )
    model = GPT(GPTConfig(vocab_size=args.vocab_size, seq_len=args.seq_len)).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint_path = args.out / "checkpoint.pt"
    step = 0
    if checkpoint_path.exists():
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        loader.load_state_dict(checkpoint["loader"])
        torch.set_rng_state(checkpoint["rng"])
        if args.device.startswith("cuda"):
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
        step = checkpoint["step"]
        print(f"resuming after step {step}", file=sys.stderr)

    model.train()
    wait_s, start, first_step = 0.0, time.perf_counter(), step
    # Without a terminal every redraw is a new line, so draw rarely.
    redraw_s = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=args.steps, initial=step, unit="step", mininterval=redraw_s, dynamic_ncols=True)
    with open(args.out / "steps.jsonl", "a", buffering=1) as log, bar:
        for batch, waited_s in itertools.islice(timed_batches(loader, step), args.steps - step):
            wait_s += waited_s
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            loss = model(
                batch["input_ids"].to(args.device, non_blocking=True),
                batch["labels"].to(args.device, non_blocking=True),
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            value = loss.item()
            log.write(json.dumps({"step": step, "loss": value, "batch": batch_digest(batch)}) + "\n")

            elapsed_s = time.perf_counter() - start
            tokens_per_s = (step - first_step) * batch["input_ids"].numel() / elapsed_s
            shown = f"loss {value:.3f}, {tokens_per_s:,.0f} tokens/s, waited {wait_s / elapsed_s:.2%}"
            bar.set_postfix_str(shown, refresh=False)
            bar.update()
            if step % args.checkpoint_every == 0 or step == args.steps:
                checkpoint = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "loader": loader.state_dict(),
                    "rng": torch.get_rng_state(),
                    "step": step,
                }
                if args.device.startswith("cuda"):
                    checkpoint["cuda_rng"] = torch.cuda.get_rng_state_all()
                save_atomically(checkpoint, checkpoint_path)
    elapsed_s = time.perf_counter() - start
    summary = {
        "steps": step - first_step,
        "tokens_per_s": (step - first_step) * args.batch_size * args.seq_len / elapsed_s,
        "waited_share": wait_s / elapsed_s,
        "device": args.device,
    }
    (args.out / "summary.json").write_text(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
