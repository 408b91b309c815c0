"""Fine-tunes with TRL's SFTTrainer on packed prompts and answers. Only answers are targets.

    python examples/trl_sft.py [FOLDER]

Forebay packs the examples while it reads them. So no dataset is packed, masked or stored before.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import small
from forebay.adapters import hugging_face
from forebay.torch import DataLoader, TokenDataset

SEQ_LEN = 128


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that TRL asks for. The data has ids already, so it tokenises nothing."""
    words = {f"<{number}>": number for number in range(small.VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<0>")), eos_token="<1>", pad_token="<0>"
    )


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else "out/trl")
    chats = small.chats(folder / "chats.parquet")
    dataset = TokenDataset(chats, seq_len=SEQ_LEN, layout="pack", fields=["completion_mask"])
    loader = DataLoader(dataset, batch_size=4, shuffle=True, seed=0, drop_last=True, batch_format="hf-packed", epochs=4)

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=small.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=SEQ_LEN, attn_implementation="sdpa",
    ))  # fmt: skip
    arguments = SFTConfig(
        str(folder / "checkpoints"), max_steps=len(loader), report_to=[], disable_tqdm=True, logging_steps=1,
        save_strategy="no", use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    # SFTTrainer wants a dataset, and never reads it: the loader takes its place.
    unused = Dataset.from_dict({"input_ids": [[1, 2]]})
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=unused, processing_class=tokenizer())
    hugging_face(trainer, loader)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{len(losses)} steps; the loss of answers went from {losses[0]:.2f} to {losses[-1]:.2f}")
    if not losses[-1] < losses[0]:
        sys.exit(1)


if __name__ == "__main__":
    main()
