"""Turns Python's own standard library into token shards. Every machine has this real text."""

import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
SHARDS = 8
END_OF_TEXT = "<|endoftext|>"
# Installed packages and tests differ between machines; the library itself does not.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_documents() -> list[str]:
    """Reads the sources of the standard library in the order of their paths, one per file."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text for text in texts if text]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def write_shards(documents: list[np.ndarray], folder: Path) -> None:
    """Writes the documents in order: 8 shards of Parquet (zstd), 8 of uncompressed Arrow."""
    ends = np.cumsum([len(document) for document in documents])
    cuts = [int(np.searchsorted(ends, ends[-1] * k / SHARDS)) for k in range(SHARDS)] + [len(documents)]
    for name in ("parquet", "arrow"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for k in range(SHARDS):
        chosen = documents[cuts[k] : cuts[k + 1]]
        offsets = np.cumsum([0] + [len(document) for document in chosen], dtype=np.int32)
        values = pa.array(np.concatenate(chosen) if chosen else np.empty(0, np.uint16))
        table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), values)})
        pq.write_table(table, folder / "parquet" / f"shard-{k}.parquet", compression="zstd")
        with pa.ipc.new_file(folder / "arrow" / f"shard-{k}.arrow", table.schema) as writer:
            writer.write_table(table)


def prepare(folder: Path, comparison_tokens: int, multiple_of: int) -> dict:
    """Writes the tokenizer, the training shards and the comparison's corpus, if missing.

    The comparison reads the same documents, repeated to about `comparison_tokens` tokens. They are
    cut to a multiple of `multiple_of`, so that an epoch leaves nothing out. The corpus comes as
    Parquet, as Arrow, and as one flat uint16 file for PyTorch.
    """
    documents = read_documents()
    wanted = hashlib.sha256(json.dumps([documents, comparison_tokens, multiple_of]).encode()).hexdigest()
    record = folder / "corpus.json"
    if record.exists() and (found := json.loads(record.read_text()))["made_from"] == wanted:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = [np.array([*encoding.ids, end], np.uint16) for encoding in tokenizer.encode_batch_fast(documents)]
    write_shards(encoded, folder)

    tokens = sum(len(document) for document in encoded)
    repetitions = max(1, round(comparison_tokens / tokens))
    stream = np.tile(np.concatenate(encoded), repetitions)
    stream = stream[: len(stream) // multiple_of * multiple_of]
    repeated = encoded * repetitions
    surplus = tokens * repetitions - len(stream)
    while surplus > 0:
        last = repeated.pop()
        if surplus < len(last):
            repeated.append(last[: len(last) - surplus])
        surplus -= len(last)
    write_shards(repeated, folder / "compare")
    stream.tofile(folder / "compare" / "tokens.bin")

    made = {
        "documents": len(documents),
        "characters": sum(len(text) for text in documents),
        "tokens": tokens,
        "comparison_tokens": len(stream),
        "repetitions": repetitions,
        "made_from": wanted,
    }
    record.write_text(json.dumps(made) + "\n")
    return made
