"""Writes small corpora for the examples: examples of prompts and answers, and plain documents."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY = 256


def documents(folder: Path, count: int = 400) -> Path:
    """Documents of counting ids, which a small model learns in a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    starts, lengths = random.integers(0, VOCABULARY, count), random.integers(20, 200, count)
    ids = [
        (np.arange(start, start + length) % VOCABULARY).tolist() for start, length in zip(starts, lengths, strict=True)
    ]
    pq.write_table(pa.table({"input_ids": ids}), folder / "documents.parquet")
    return folder


def chats(path: Path, count: int = 200) -> Path:
    """Prompts and answers, with a mask that is 1 at the answers, as TRL writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    prompts = [random.integers(1, VOCABULARY, random.integers(3, 20)).tolist() for _ in range(count)]
    answers = [list(reversed(prompt)) for prompt in prompts]
    table = {
        "input_ids": [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        "completion_mask": [[0] * len(prompt) + [1] * len(prompt) for prompt in prompts],
    }
    pq.write_table(pa.table(table), path)
    return path
