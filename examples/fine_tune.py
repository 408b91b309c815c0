"""Fine-tunes the small GPT on prompts and answers from a Parquet file, packed into rows.

    python examples/fine_tune.py out/demo/parquet --out out/run

A row of the file is one example: `input_ids`, and `labels` that are -100 on the prompt. Packing
puts whole examples into rows. No example attends to another, and no prompt is a target.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from forebay.torch import DataLoader, TokenDataset
from model import GPT, GPTConfig

SEQ_LEN, BATCH_SIZE = 256, 8
IGNORED = -100


def write_examples(corpus: Path, path: Path, count: int) -> list[dict[str, list[int]]]:
    """Writes `count` examples of the documents of `corpus`, and returns them.

    A stretch of a document is an example. Its first third is the prompt, and the rest the answer.
    """
    draw = np.random.default_rng(0)
    tables = (pq.read_table(shard) for shard in sorted(corpus.glob("*.parquet")))
    documents = (row for table in tables for row in table.column("input_ids").to_pylist())
    rows = []
    for document in documents:
        start = 0
        while (length := int(draw.integers(24, 200))) + start <= len(document):
            ids = document[start : start + length]
            prompt = length // 3
            rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
            start += length
        if len(rows) >= count:
            break
    rows = rows[:count]
    kinds = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    pq.write_table(pa.Table.from_pylist(rows, kinds), path)
    return rows


def loss_alone(model: GPT, rows: list[dict[str, list[int]]]) -> float:
    """The mean loss of the targets of examples that the model reads one by one."""
    total, targets = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        count = int((labels[:, 1:] != IGNORED).sum())
        total += float(model(ids, labels)) * count
        targets += count
    return total / targets


def examples_in(batch: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    """The examples of a packed batch, without its padding."""
    ids, labels, numbers = (batch[name].flatten().tolist() for name in ("input_ids", "labels", "doc_ids"))
    borders = batch["cu_seqlens"].tolist()
    return [
        {"input_ids": ids[start:end], "labels": labels[start:end]}
        for start, end in itertools.pairwise(borders)
        if numbers[start] >= 0
    ]


def fine_tune(path: Path, checkpoint: Path | None, steps: int) -> dict:
    """Trains `steps` steps, and returns the losses with the facts that the demo checks."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(seq_len=SEQ_LEN))
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    # These lines are all that fine-tuning needs of Forebay.
    dataset = TokenDataset(path, fields=["labels"], seq_len=SEQ_LEN, layout="pack", document_mask=True)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, seed=0)

    with torch.no_grad():
        first = next(iter(loader))
        model.eval()
        packed = float(model(*(first[name] for name in ("input_ids", "labels", "position_ids", "document_mask"))))
        alone = loss_alone(model, examples_in(first))
        targets = sum(int((batch["labels"] != IGNORED).sum()) for batch in loader)
        stats = [batch["doc_ids"] >= 0 for batch in loader]
        filled = float(torch.cat([real.flatten() for real in stats]).float().mean())

    model.train()
    losses: list[float] = []
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for batch in loader:
            loss = model(batch["input_ids"], batch["labels"], batch["position_ids"], batch["document_mask"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if len(losses) == steps:
                return {"losses": losses, "packed": packed, "alone": alone, "targets": targets, "filled": filled}
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder of Parquet shards with tokens")
    parser.add_argument("--out", type=Path, default=Path("out/run"))
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of train_gpt.py to start from")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "examples.parquet"
    write_examples(args.corpus, path, args.examples)
    print(json.dumps(fine_tune(path, args.checkpoint, args.steps)))


if __name__ == "__main__":
    main()
