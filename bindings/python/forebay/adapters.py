"""Loaders in the shapes that some trainers ask for.

These trainers take neither torch's DataLoader nor any iterable. Importing this module imports none
of their projects. Each adapter holds a loader of ``forebay.torch`` and keeps its state there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from forebay._errors import ConfigError
from forebay._formats import Format
from forebay.torch import DataLoader, TokenDataset
from forebay.torch.tensors import Tensors, Torch

__all__ = [
    "DataLoader",
    "TokenDataset",
    "hugging_face",
    "megatron",
    "olmo",
    "torchtitan",
]


def hugging_face(trainer: Any, loader: DataLoader[Any]) -> None:
    """Lets a Trainer of transformers train on a native `loader`, and resume within any epoch.

    With ``batch_format="hf-packed"`` it resumes at the start of an epoch.

    Raises
    ------
    ConfigError
        The Trainer resumes within an epoch, and the loader has ``batch_format="hf-packed"``. The
        check runs when training begins.
    """

    def on_epoch_begin(_: Any, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.epoch != int(state.epoch) and loader.config["batch_format"] == "hf-packed":
            # Trainer makes a loader of the rows to skip batches, which does not know the format.
            raise ConfigError(
                'Trainer cannot resume within an epoch with batch_format="hf-packed": its batches would not say where '
                'documents begin; resume from a checkpoint of an epoch\'s end, as `save_strategy="epoch"` saves them'
            )
        # Trainer tells the epoch to the object that it iterates. After a resume, that is a loader
        # that Trainer made itself.
        loader.set_epoch(int(state.epoch))

    base = importlib.import_module("transformers").TrainerCallback
    trainer.add_callback(type("TellEpoch", (base,), {"on_epoch_begin": on_epoch_begin}))
    trainer.get_train_dataloader = lambda: loader


def _form(loader: DataLoader[Any], name: str, what: str, targets: str) -> Callable[[Any], Any]:
    """Returns the function that gives batches of `loader` the format `name`."""
    config = loader.config
    if config["targets"] != targets:
        ahead = "one token ahead" if targets == "shifted" else "at their tokens"
        raise ConfigError(f'{what} takes labels that are {ahead}: open the TokenDataset with targets="{targets}"')
    if config["batch_format"] == name:
        return lambda batch: batch
    if config["batch_format"] is not None or config["fields"]:
        # The settings of a format say whether it has a place for a column.
        raise ConfigError(f'{what} takes other batches: open the DataLoader with batch_format="{name}"')
    return Format(name, config, Torch())


class _Titan:
    """The data loader that torchtitan's trainer takes.

    It has no end, because that trainer counts steps.
    """

    def __init__(self, loader: DataLoader[Any], form: Callable[[Any], Any]) -> None:
        self._loader, self._form = loader, form

    def __iter__(self) -> Iterator[tuple[Tensors, torch.Tensor]]:
        while True:
            for batch in self._loader:
                yield self._form(batch)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(state_dict)

    def close(self) -> None:
        self._loader.close()


def torchtitan(loader: DataLoader[Any], base: type | None = None, *, flat: bool = True) -> Any:
    """Makes a ``BaseDataLoader`` of torchtitan from `loader`.

    Parameters
    ----------
    base:
        ``torchtitan.components.dataloader.BaseDataLoader``, or None. The adapter becomes an
        instance of it.
    flat:
        True gives batches of ``batch_format="titan"``, with one axis of tokens and with
        ``positions``, as torchtitan takes them since August 2026. False gives batches of rows.

    Raises
    ------
    ConfigError
        The loader does not have ``targets="shifted"``, or has batches of another form.
    """
    if flat:
        rows = _form(loader, "titan", "torchtitan", "shifted")
    else:
        form = _form(loader, "xy", "torchtitan", "shifted")

        def rows(batch: Any) -> Any:
            return _named_input(*form(batch))

    kind = _Titan if base is None else type("ForebayDataLoader", (_Titan, base), {})
    return kind(loader, rows)


def _named_input(inputs: torch.Tensor, labels: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return {"input": inputs}, labels


class _Megatron:
    """The iterator that Megatron-LM takes with ``--dataloader-type external``.

    It has no end, because that trainer counts steps.
    """

    def __init__(self, loader: DataLoader[Any], form: Callable[[Any], Any]) -> None:
        self._loader, self._form = loader, form
        self._batches: Any = None

    def __iter__(self) -> Iterator[Tensors]:
        return self

    def __next__(self) -> Tensors:
        batch = None if self._batches is None else next(self._batches, None)
        if batch is None:
            self._batches = iter(self._loader)
            batch = next(self._batches)
        made: Tensors = self._form(batch)
        return made

    def save_state(self) -> dict[str, Any]:
        """Returns the state that Megatron-LM stores for each data-parallel rank.

        It is the same for all ranks.
        """
        return self._loader.state_dict()

    def restore_state(self, state: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(state)
        self._batches = None


def megatron(loader: DataLoader[Any], state: Mapping[str, Any] | None = None) -> Any:
    """Makes an external data iterator of Megatron-LM from `loader`.

    It gives batches of ``batch_format="megatron"``.

    Parameters
    ----------
    state:
        A state that ``save_state()`` returned. The iterator continues there. Megatron-LM stores
        the state as ``dataloader_state_dict``. The code that builds the iterator must restore it.

    Raises
    ------
    ConfigError
        The loader does not have ``targets="shifted"``, or has batches of another form.
    """
    iterator = _Megatron(loader, _form(loader, "megatron", "Megatron-LM", "shifted"))
    if state is not None:
        iterator.restore_state(state)
    return iterator


class _Olmo:
    """The data loader that OLMo-core's trainer and its callbacks read. Its epochs begin at 1."""

    def __init__(self, loader: DataLoader[Any], form: Callable[[Any], Any], fs_local_rank: int) -> None:
        config = loader.config
        self._loader, self._form = loader, form
        self._epoch: int | None = None
        self.fs_local_rank = fs_local_rank
        self.dp_rank: int = config["dp_rank"] or 0
        self.dp_world_size: int = config["dp_world_size"] or 1
        self.rank_batch_size: int = config["batch_size"] * config["seq_len"]
        self.global_batch_size: int = self.rank_batch_size * self.dp_world_size
        self.batches_processed = 0
        self.tokens_processed = 0

    @property
    def epoch(self) -> int:
        if self._epoch is None:
            raise RuntimeError("the epoch is not set yet: call `reshuffle()` first")
        return self._epoch

    @property
    def total_batches(self) -> int:
        return len(self._loader)

    def __len__(self) -> int:
        return self.total_batches

    def batches_in_epoch(self, epoch: int) -> int:
        return self.total_batches

    def reshuffle(self, epoch: int | None = None, **_: Any) -> None:
        """Goes to `epoch`. A position of that epoch that was restored stays."""
        if epoch is None:
            epoch = 1 if self._epoch is None else self._epoch + 1
        if epoch < 1:
            raise ValueError(f"`epoch` must be 1 or more, found {epoch}")
        self._epoch = epoch
        self._loader.set_epoch(epoch - 1)

    def reset(self) -> None:
        self.batches_processed = self.tokens_processed = 0

    def __iter__(self) -> Iterator[Tensors]:
        for batch in self._loader:
            self.batches_processed += 1
            self.tokens_processed += self.global_batch_size
            yield self._form(batch)

    def global_num_tokens_in_batch(self, batch: Mapping[str, Any]) -> int:
        return self.global_batch_size

    def get_mock_batch(self) -> Tensors:
        """Returns zeros with the shape of a batch."""
        config = self._loader.config
        return {"input_ids": torch.zeros(config["batch_size"], config["seq_len"], dtype=torch.int64)}

    get_test_batch = get_mock_batch

    def state_dict(self) -> dict[str, Any]:
        names = ("batches_processed", "tokens_processed")
        return {
            "loader": self._loader.state_dict(),
            "epoch": self._epoch,
            **{name: getattr(self, name) for name in names},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(state_dict["loader"])
        self._epoch = state_dict["epoch"]
        self.batches_processed = state_dict["batches_processed"]
        self.tokens_processed = state_dict["tokens_processed"]


def olmo(loader: DataLoader[Any], *, fs_local_rank: int = 0) -> Any:
    """Makes a data loader of OLMo-core's trainer from `loader`.

    It gives batches of ``batch_format="olmo"``.

    Raises
    ------
    ConfigError
        The loader does not have ``targets="labels"``, has batches of another form, or its batches
        may have several sizes.
    """
    config = loader.config
    if config["remainder"] == "short" or config["pad_to_multiple"] is not None:
        raise ConfigError("OLMo-core takes batches of one size: set `drop_last=True`, and no `pad_to_multiple`")
    return _Olmo(loader, _form(loader, "olmo", "OLMo-core", "labels"), fs_local_rank)
