"""Trains with the Hugging Face Trainer, evaluates on held-out rows, stops, and resumes.

    python examples/hugging_face.py [FOLDER]

FOLDER takes the data and the checkpoints; `out/hugging_face` is the default. The second Trainer
goes on from the first one's checkpoint, and gets exactly the batches that are left.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import small
from forebay.adapters import hugging_face
from forebay.torch import DataLoader, TokenDataset

SEQ_LEN, BATCH_SIZE, HOLDOUT = 64, 4, 10


class Recorder(GPT2LMHeadModel):
    """A model that remembers the first ids of the rows that it was trained on."""

    seen: list[list[int]]

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **more: Any) -> Any:
        if self.training:
            self.seen.append(input_ids[:, 0].tolist())
        return super().forward(input_ids=input_ids, labels=labels, **more)


def trainer_of(corpus: Path, folder: Path) -> Trainer:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=small.VOCABULARY, n_positions=SEQ_LEN, n_embd=32, n_layer=2, n_head=2)
    model = Recorder(config)
    model.seen = []
    parts = {"seq_len": SEQ_LEN, "holdout": HOLDOUT}
    loader = DataLoader(
        TokenDataset(corpus, split="train", **parts), batch_size=BATCH_SIZE, shuffle=True, seed=0, drop_last=True,
        batch_format="hf",
    )  # fmt: skip
    arguments = TrainingArguments(
        str(folder / "checkpoints"), num_train_epochs=1, save_steps=20, logging_steps=20, report_to=[],
        per_device_eval_batch_size=BATCH_SIZE, disable_tqdm=True, learning_rate=3e-3,
    )  # fmt: skip
    held_out = TokenDataset(corpus, split="holdout", **parts)
    trainer = Trainer(model=model, args=arguments, eval_dataset=held_out)
    hugging_face(trainer, loader)
    return trainer


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else "out/hugging_face")
    corpus = small.documents(folder / "corpus", count=150)
    whole = trainer_of(corpus, folder)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    after = whole.evaluate()["eval_loss"]
    print(f"loss of held-out rows: {before:.2f} before, {after:.2f} after {whole.state.global_step} steps")

    resumed = trainer_of(corpus, folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-20"))
    left = whole.model.seen[20:]
    print(f"resumed at step 20: {len(resumed.model.seen)} batches, as expected: {resumed.model.seen == left}")
    if resumed.model.seen != left or not after < before:
        sys.exit(1)


if __name__ == "__main__":
    main()
