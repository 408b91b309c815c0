"""Trains with Lightning, and resumes from a checkpoint in the middle of an epoch.

    python examples/lightning_gpt.py [FOLDER]

Lightning finds `state_dict` of the loader by itself, so the program needs nothing for it.
"""

import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import small
from forebay.torch import DataLoader, TokenDataset
from model import GPT, GPTConfig

SEQ_LEN = 64


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(small.VOCABULARY, SEQ_LEN, layers=2, heads=2, width=32, dropout=0.0))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"][:, 0].tolist())
        return self.model(batch["input_ids"], batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(corpus: Path, folder: Path, checkpoint: str | None = None) -> Module:
    loader = DataLoader(TokenDataset(corpus, seq_len=SEQ_LEN), batch_size=8, shuffle=True, seed=0, drop_last=True)
    kept = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=20, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, callbacks=[kept], default_root_dir=str(folder), logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else "out/lightning")
    corpus = small.documents(folder / "corpus")
    whole = fit(corpus, folder)
    resumed = fit(corpus, folder / "again", str(folder / "checkpoints" / "step=20.ckpt"))
    same = resumed.seen == whole.seen[20:]
    print(f"{len(whole.seen)} steps; resumed at step 20: {len(resumed.seen)} batches, as expected: {same}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
