"""Trains a bigram model in JAX on batches of NumPy arrays, stops, and resumes.

    python examples/jax_loop.py [FOLDER]

Each process of a JAX cluster passes `jax.process_index()` and `jax.process_count()` as its rank.
Torch is not needed.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import small
from forebay import Loader


def loader_of(corpus: Path) -> Loader:
    ranks = {"dp_rank": jax.process_index(), "dp_world_size": jax.process_count()}
    return Loader(corpus, seq_len=64, batch_size=8, shuffle=True, seed=0, batch_format="jax", **ranks)


def loss_of(table: jax.Array, batch: Any) -> jax.Array:
    scores = jax.nn.log_softmax(table[batch["inputs"]])
    found = jnp.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
    wanted = batch["targets_segmentation"] > 0
    return -(found * wanted).sum() / wanted.sum()


@jax.jit
def step(table: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    loss, gradient = jax.value_and_grad(loss_of)(table, batch)
    return table - 50.0 * gradient, loss


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else "out/jax")
    corpus = small.documents(folder / "corpus")
    names = ("inputs", "targets", "targets_segmentation")
    table, losses, first_ids, state = jnp.zeros((small.VOCABULARY, small.VOCABULARY)), [], [], {}
    with loader_of(corpus) as loader:
        for number, batch in enumerate(loader):
            table, loss = step(table, {name: batch[name] for name in names})
            losses.append(float(loss))
            first_ids.append(np.asarray(batch["inputs"])[:, 0].tolist())
            if number == 9:
                state = loader.state_dict()
    with loader_of(corpus) as loader:
        loader.load_state_dict(state)
        rest = [np.asarray(batch["inputs"])[:, 0].tolist() for batch in loader]
    print(f"{len(losses)} steps, loss from {losses[0]:.2f} to {losses[-1]:.2f}")
    print(f"resumed after 10 steps, batches as expected: {rest == first_ids[10:]}")
    if rest != first_ids[10:] or not losses[-1] < losses[0]:
        sys.exit(1)


if __name__ == "__main__":
    main()
