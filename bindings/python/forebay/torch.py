"""Tensors, and a stand-in for ``torch.utils.data.DataLoader``. Only this module, and what belongs to it, imports torch.

A ``TokenDataset`` in this ``DataLoader`` goes the native way: batches are computed by forebay's threads, and no Python
runs for them. Everything else goes the Python way: the dataset's own code, on threads of this process instead of worker
processes.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self, SupportsFloat, SupportsIndex, TypeVar

import numpy.typing as npt
import torch
import torch.distributed
import torch.utils.dlpack
from torch._C._autograd import _profiler_enabled
from torch.utils.data import Dataset, DistributedSampler, IterableDataset, Sampler, _DatasetKind
from torch.utils.data._utils import worker as torch_worker

from forebay import _core
from forebay._datasets import DatasetIterator, Position, State, _Order, checked, first_state, is_plain
from forebay._device import Ahead, Cuda, Handed, Link
from forebay._errors import ConfigError
from forebay._loader import Data, Loader, Skip, WholeLoader, finite, first_time, log_notes, settings_of
from forebay._split import Consumer, Split, check

__all__ = ["DataLoader", "TokenDataset"]

Tensors = dict[str, torch.Tensor]
_T_co = TypeVar("_T_co", covariant=True)


class TokenDataset(Dataset[Tensors]):
    """Sequences of a corpus, in corpus order: ``dataset[i]`` is a dict of 1-D tensors of ``seq_len`` tokens.

    Opened at its first use in each process, so that it can be pickled and forked. The arguments are those of
    ``forebay.Loader``.
    """

    def __init__(
        self,
        data: Data | None = None,
        *,
        mixture: Mapping[str, Any] | str | None = None,
        format: Literal["auto", "parquet", "arrow"] | None = None,
        token_column: str | None = None,
        seq_len: int | None = None,
        targets: Literal["labels", "shifted"] | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        holdout: int | None = None,
        split: Literal["train", "holdout"] | None = None,
        input_dtype: npt.DTypeLike | None = None,
        memory_budget: int | None = None,
        block_tokens: int | None = None,
        io: Literal["auto", "mmap", "pread"] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        settings = dict(
            mixture=mixture,
            format=format,
            token_column=token_column,
            seq_len=seq_len,
            targets=targets,
            bos_id=bos_id,
            eos_id=eos_id,
            holdout=holdout,
            split=split,
            input_dtype=input_dtype,
            memory_budget=memory_budget,
            block_tokens=block_tokens,
            io=io,
            cache_dir=cache_dir,
        )
        self._pairs = settings_of(data, settings)
        self._opened: tuple[int, _core.Loader] | None = None

    def _core(self) -> _core.Loader:
        process = os.getpid()
        if self._opened is None or self._opened[0] != process:
            alone = dict(shuffle=False, batch_size=1, dp_rank=0, dp_world_size=1, remainder="drop", prefetch_batches=1)
            self._opened = process, _core.Loader.open(self._pairs + settings_of(None, alone), False)
        return self._opened[1]

    def __len__(self) -> int:
        """Full sequences of the corpus."""
        return finite(self._core().num_sequences)

    def __getitem__(self, index: int) -> Tensors:
        """Sequence ``index``: ``input_ids`` and ``labels``, or ``x`` and ``y``."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensors]:
        """Several sequences at once; neighbours are read together."""
        core, length = self._core(), len(self)
        rows: list[Tensors] = []
        at = 0
        while at < len(indices):
            first = int(indices[at])
            if not -length <= first < length:
                raise IndexError(f"sequence {first} is asked for, the corpus has {length}")
            first %= length
            n = 1
            while at + n < len(indices) and indices[at + n] == first + n < length:
                n += 1
            batch = _tensors(core.sequences_at(0, first, n))
            rows.extend({name: tensor[row] for name, tensor in batch.items()} for row in range(n))
            at += n
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class _Rows(IterableDataset[Tensors]):
    """``dataset`` of a native loader: its rows one by one, for trainers that batch them again to skip some.

    They must be told the epoch. Hugging Face's Trainer does not tell it where it resumes within any but the first: let
    the ``on_epoch_begin`` of a callback call ``train_dataloader.set_epoch(int(state.epoch))``.
    """

    def __init__(self, loader: Loader, tokens: TokenDataset) -> None:
        self._loader = loader
        #: The dataset that was given.
        self.tokens = tokens

    def __len__(self) -> int:
        """Full sequences of an epoch, over all ranks."""
        return self._loader.num_sequences

    def __getitem__(self, index: int) -> Tensors:
        return self.tokens[index]

    def __iter__(self) -> Iterator[Tensors]:
        """Rows of this rank, in a new pass of the loader."""
        if torch_worker.get_worker_info() is not None:
            raise RuntimeError("each worker would read all rows: give that DataLoader the TokenDataset itself")
        core = self._loader._open_core().iter()
        while (batch := core.next()) is not None:
            tensors = _tensors(batch)
            for row in range(batch.rows):
                yield {name: tensor[row] for name, tensor in tensors.items()}

    def set_epoch(self, epoch: int) -> None:
        """The next pass begins this epoch, unless a position of it was restored and not continued yet."""
        self._loader.set_epoch(epoch)


def _native_tensors() -> _core.Tensors | None:
    """torch's own way of making tensors from C; there since torch 2.10."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    return None if exchange is None else _core.Tensors.by(exchange)


_NATIVE = _native_tensors()


def _tensors(batch: _core.Batch) -> Tensors:
    if _NATIVE is not None:
        return batch.tensors(_NATIVE)
    return {name: torch.utils.dlpack.from_dlpack(array) for name, array in batch.fields()}


_UNPINNED = "'pin_memory' argument is set as true but no accelerator is found, then device pinned memory won't be used."


def _pinned(nbytes: int) -> torch.Tensor:
    # torch's own allocator reuses a block only after the copies issued from it have ended, which no other memory gets.
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


_resuming = threading.Lock()


class DataLoader(torch.utils.data.DataLoader[_T_co]):
    """``torch.utils.data.DataLoader`` without worker processes; the same arguments, and forebay's settings by keyword.

    The native way is taken for a ``TokenDataset`` with no sampler or a ``DistributedSampler``, no ``batch_sampler`` and
    no ``collate_fn``. Batches are dicts of tensors of shape ``(batch_size, seq_len)``. There, ``num_workers=0`` means
    the default number of threads; ``worker_init_fn``, ``persistent_workers`` and ``in_order`` have nothing to act on;
    ``drop_last=False`` delivers the tail in a short batch on one rank, and padded on several; ``pin_memory=True`` fills
    torch's page-locked memory directly. Their ``dataset`` goes through the same rows one by one; its ``tokens`` is
    the TokenDataset.

    On the Python way, ``num_workers`` counts threads: batches come in order, exceptions keep their type and their
    traceback, and ``torch.utils.data.get_worker_info()`` answers for each thread. Map-style datasets resume with any
    ``num_workers``, iterable ones with the same. docs/torch.md has all that differs from torch.

    Parameters
    ----------
    seed:
        Default: ``generator.initial_seed()`` if there is a generator, else 0.
    dp_rank, dp_world_size:
        Default: those of the sampler, of torch.distributed if it is initialised, of the launcher, else 0 of 1.
    mesh:
        A ``torch.distributed.device_mesh.DeviceMesh``: only ranks that differ in its data-parallel dimensions (named
        ``dp``, ``dp_replicate``, ``dp_shard``, ``fsdp``, ``ddp`` or ``data``, or its only one) read different rows.
    remainder:
        Overrules ``drop_last``.
    device:
        A CUDA device: batches are copied there on a stream of their own, and are safe to use on the current one.
        Implies ``pin_memory``. Default: host memory.
    device_prefetch:
        Batches copied ahead of the one handed over. Default: 2.

    Raises
    ------
    ConfigError
        A setting is unusable, or the launcher's rank is not that of torch.distributed.
    """

    #: The position after the batches handed over by the newest pass.
    state_dict: Callable[[], dict[str, Any]]
    #: The next pass continues there.
    load_state_dict: Callable[[Mapping[str, Any]], None]

    def __init__(
        self,
        dataset: Dataset[_T_co],
        batch_size: int | None = 1,
        shuffle: bool | Literal["global", "block"] | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        seed: int | None = None,
        dp_rank: int | None = None,
        dp_world_size: int | None = None,
        mesh: Any = None,
        replication: int | None = None,
        epochs: int | Literal["endless"] | None = None,
        max_steps: int | None = None,
        remainder: Literal["drop", "pad", "wrap", "short"] | None = None,
        pad_id: int | None = None,
        sample_ids: bool | None = None,
        chunk_tokens: int | None = None,
        window_tokens: int | None = None,
        lanes: int | None = None,
        skip: Skip | None = None,
        extend: bool | None = None,
        num_threads: int | None = None,
        cpu_affinity: str | Iterable[int] | None = None,
        thread_priority: int | None = None,
        prefetch_batches: int | None = None,
        memory_budget: int | None = None,
        block_tokens: int | None = None,
        io: Literal["auto", "mmap", "pread"] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        ledger: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        device_prefetch: int = 2,
        _allocator: Callable[[int], torch.Tensor] | None = None,
        _link: Callable[[], Link] | None = None,
    ) -> None:
        self.multiprocessing_context = multiprocessing_context
        for name, value, kind in (
            ("num_workers", num_workers, SupportsIndex),
            ("device_prefetch", device_prefetch, SupportsIndex),
            ("timeout", timeout, SupportsFloat),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"`{name}` must be a number, found {type(value).__name__}")
            if value < 0:
                raise ValueError(f"`{name}` must not be negative, found {value}")
        link = _link_to(device) if _link is None else _link
        pin_memory = pin_memory or (link is not None and _link is None)
        if mesh is not None:
            if dp_rank is not None or dp_world_size is not None:
                raise ConfigError("`mesh` says the data-parallel rank: leave `dp_rank` and `dp_world_size` out")
            dp_rank, dp_world_size = _rank_in(mesh)
        settings: dict[str, Any] = dict(
            seed=seed,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            replication=replication,
            epochs=epochs,
            max_steps=max_steps,
            remainder=remainder,
            pad_id=pad_id,
            sample_ids=sample_ids,
            chunk_tokens=chunk_tokens,
            window_tokens=window_tokens,
            lanes=lanes,
            skip=skip,
            extend=extend,
            num_threads=num_threads,
            cpu_affinity=cpu_affinity,
            thread_priority=thread_priority,
            prefetch_batches=prefetch_batches,
            memory_budget=memory_budget,
            block_tokens=block_tokens,
            io=io,
            cache_dir=cache_dir,
            ledger=ledger,
        )
        native = (
            is_plain(dataset, TokenDataset, "__getitem__", "__getitems__", "__len__")
            and (sampler is None or is_plain(sampler, DistributedSampler, "__iter__", "__len__"))
            and batch_sampler is None
            and collate_fn is None
            and batch_size is not None
        )
        self._native: Loader | None = None
        if not native:
            given = [name for name, value in settings.items() if value is not None]
            if given or shuffle not in (None, True, False):
                given = given or [f"shuffle={shuffle}"]
                raise ConfigError(
                    f"{', '.join(f'`{name}`' for name in given)}: only for a TokenDataset without `collate_fn`, "
                    "`batch_sampler`, and samplers other than DistributedSampler"
                )
            super().__init__(
                dataset,
                batch_size,
                shuffle,
                sampler,
                batch_sampler,
                num_workers,
                collate_fn,
                pin_memory,
                drop_last,
                timeout,
                worker_init_fn,
                None,
                generator,
                prefetch_factor=prefetch_factor,
                persistent_workers=persistent_workers,
                pin_memory_device=pin_memory_device,
                in_order=in_order,
            )
            self._restored: State | None = None
            self._position: Position | None = None
            self._bind_state(link, device_prefetch)
            return

        assert isinstance(dataset, TokenDataset)
        if isinstance(sampler, DistributedSampler):
            if shuffle:
                raise ValueError("sampler option is mutually exclusive with shuffle")
            shuffle = sampler.shuffle
            settings["seed"] = sampler.seed if seed is None else seed
            if dp_rank is None and dp_world_size is None:
                settings["dp_rank"], settings["dp_world_size"] = sampler.rank, sampler.num_replicas
            drop_last = drop_last or sampler.drop_last
        elif generator is not None and seed is None:
            settings["seed"] = generator.initial_seed()
        if num_workers > 0 and num_threads is None:
            settings["num_threads"] = num_workers
        if prefetch_factor is not None and prefetch_batches is None:
            settings["prefetch_batches"] = prefetch_factor * max(num_workers, 1)
        settings["shuffle"], settings["batch_size"], settings["pin_memory"] = shuffle, batch_size, pin_memory or None
        own = settings_of(None, settings)
        names = {name for name, _ in own}
        pairs = [pair for pair in dataset._pairs if pair[0] not in names] + own
        pairs = _with_ranks(pairs)
        config, *_ = _core.resolve(pairs, False)
        if remainder is None:
            rest = "short" if config["dp_world_size"] in (None, 1) else "pad"
            pairs.append(("remainder", "drop" if drop_last else rest))

        allocator = _allocator
        pin_memory = config["pin_memory"]
        if pin_memory and allocator is None:
            if torch.cuda.is_available():
                allocator = _pinned
            elif first_time(_UNPINNED):
                warnings.warn(_UNPINNED, stacklevel=2)
        self._native = Loader._of(pairs)
        self._allocator = allocator
        self._limit_s = timeout or None
        self._sampler_epoch = getattr(sampler, "epoch", None)
        self.dataset = _Rows(self._native, dataset)  # type: ignore[assignment]
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = 0
        self.prefetch_factor = None
        self.pin_memory = pin_memory
        self.pin_memory_device = pin_memory_device
        # Who builds a loader of torch's from these would set a limit to workers that it has none of.
        self.timeout = 0
        self.worker_init_fn = None
        self.in_order = in_order
        self.drop_last = self._native.config["remainder"] == "drop"
        self.sampler = sampler  # type: ignore[assignment]
        self.batch_sampler = None
        self.generator = generator
        self.collate_fn = None  # type: ignore[assignment]
        self.persistent_workers = False
        self._dataset_kind = _DatasetKind.Iterable
        self._IterableDataset_len_called = None
        self._iterator = None
        self._DataLoader__multiprocessing_context = None
        # Accelerate then takes this loader as it is, and stores its state.
        self._is_accelerate_prepared = True
        self.use_stateful_dataloader = True
        self.end_of_dataloader = False
        self.remainder = -1
        self._bind_state(link, device_prefetch)
        self._DataLoader__initialized = True

    def _bind_state(self, link: Callable[[], Link] | None, device_prefetch: int) -> None:
        self._link = link
        self.device_prefetch = device_prefetch
        self._handed: Handed | None = None
        # In `__dict__`, which wrappers of Lightning Fabric and Ray copy.
        self.state_dict = self._state_handed_over
        self.load_state_dict = self._load_state

    def _state_handed_over(self) -> State:
        return self._state_taken() if self._handed is None else dict(self._handed.state)

    def _state_taken(self) -> State:
        """The position after what was taken, which on the way to a device is ahead of what was handed over."""
        return self._dataset_state() if self._native is None else self._native.state_dict()

    def _load_state(self, state_dict: Mapping[str, Any]) -> None:
        if isinstance(state_dict, Mapping) and not state_dict:
            return
        if self._native is None:
            self._load_dataset_state(state_dict)
        else:
            self._native.load_state_dict(state_dict)
        self._handed = None

    def _begun_ahead(self, handed: Handed) -> None:
        self._handed = handed

    def _ahead(self, take: Callable[[float | None], Any]) -> Ahead | None:
        """What brings the batches of a new pass to the device."""
        if self._link is None:
            return None
        return Ahead(self._link(), take, self._state_taken, self._begun_ahead, self.device_prefetch)

    def _dataset_state(self) -> State:
        if self._restored is not None:
            return dict(self._restored)
        return first_state(self) if self._position is None else self._position.snapshot()

    def _load_dataset_state(self, state_dict: Mapping[str, Any]) -> None:
        state = checked(self, state_dict)
        if state["epoch"] != -1:
            # The sampler is told where to go on; who tells it of another epoch later begins that one.
            _Order(self).set_epoch(state["epoch"])
        self._restored = state

    def _take_restored(self) -> State | None:
        """The state that the pass which begins now has to continue."""
        with _resuming:
            state, self._restored = self._restored, None
            return state

    def __getstate__(self) -> dict[str, Any]:
        kept = self.__dict__.copy()
        if self._native is None:
            state = self._state_handed_over()
            kept.update(_restored=state if state["batches"] else None, _position=None)
        del kept["state_dict"], kept["load_state_dict"]
        return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)
        handed = self._handed
        self._bind_state(self._link, self.device_prefetch)
        if self._native is not None and handed is not None:
            self._native.load_state_dict(handed.state)

    @property
    def _loader(self) -> Loader:
        if self._native is None:
            raise TypeError("only a native loader can do this: one of a TokenDataset without own sampling or collating")
        return self._native

    def __iter__(self) -> Any:
        """A new pass; it begins at its first ``next()``."""
        if self._native is not None:
            return _NativeIterator(self, self._native)
        return DatasetIterator(self)

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self._native) if self._native is not None else super().__len__()

    @property
    def multiprocessing_context(self) -> None:
        """None: there are no processes, and setting it is an error."""
        return None

    @multiprocessing_context.setter
    def multiprocessing_context(self, context: Any) -> None:
        if context is not None:
            raise ValueError(
                "`multiprocessing_context` has no meaning here: workers are threads of this process; leave it out"
            )

    def check_worker_number_rationality(self) -> None:
        """Nothing: it warns of too many processes, and there are none."""

    def set_epoch(self, epoch: int) -> None:
        """The next pass begins this epoch, unless a position of it was restored and not continued yet.

        On the Python way, passed on to whichever of sampler, batch sampler and dataset has the method.
        """
        if self._native is not None:
            self._native.set_epoch(epoch)
            return
        for part in (self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None), self.dataset):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
                return

    def _follow_sampler(self) -> None:
        epoch = getattr(self.sampler, "epoch", None)
        # Only a change is an order to go there: a sampler never told of the epoch must not undo a restored one.
        if epoch is not None and epoch != self._sampler_epoch:
            self._sampler_epoch = epoch
            self._loader.set_epoch(epoch)

    def split(self, count: int, *, ahead: int | None = None) -> list[Consumer[Tensors]]:
        """Consumers for `count` threads, that share this loader's threads, mapping and windows. Native loaders only.

        Each is a rank of its own: consumer `i` gets every `count`-th row of each batch from the `i`-th on, as rank
        ``dp_rank + i * dp_world_size`` of ``dp_world_size * count`` ranks gets with a `count`-th of the batch size. A
        consumer may be `ahead` batches before the slowest one, and waits for it then (default: ``prefetch_batches``).
        ``state_dict`` then gives the position after the last batch that all consumers have.

        Raises
        ------
        ConfigError
            Rows cannot be dealt out evenly: `batch_size` is no multiple of `count`, or a last batch may be short.
        """
        loader = self._loader
        if self._link is not None:
            raise ConfigError("`device` is one device: leave it out, and copy in the thread of each consumer")
        loader._split = Split(_Whole(self), count, check(count, ahead, loader.config), self._limit_s)
        return loader._split.consumers

    def seek(self, position: int, epoch: int | None = None) -> None:
        """The next pass begins at `position` of `epoch` (default: the present one). Native loaders only."""
        self._loader.seek(position, epoch)
        self._handed = None

    @property
    def config(self) -> dict[str, Any]:
        """Every setting in force. Native loaders only."""
        return self._loader.config

    @property
    def origins(self) -> dict[str, str]:
        """Where each setting comes from. Native loaders only."""
        return self._loader.origins

    def stats(self) -> dict[str, Any]:
        """What happened so far. Native loaders only."""
        return self._loader.stats()

    def verdict(self) -> str:
        """Who waits for whom, in one line. Native loaders only."""
        return self._loader.verdict()

    def close(self) -> None:
        """Stops every pass; batches already handed over stay valid."""
        if self._native is not None:
            self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _link_to(device: str | torch.device | None) -> Callable[[], Link] | None:
    """Makes the way to `device` for a pass; None for host memory."""
    place = torch.device("cpu" if device is None else device)
    if place.type == "cpu":
        return None
    if place.type != "cuda":
        raise ConfigError(f"`device` must be a CUDA device or cpu, found {place}")
    if not torch.cuda.is_available():
        raise ConfigError(f"`device` is {place}, but torch finds no CUDA device")
    if place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return functools.partial(Cuda, place)


def _with_ranks(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Adds the rank of torch.distributed where nothing else was given."""
    names = {name for name, _ in pairs}
    dist = torch.distributed
    if names & {"dp_rank", "dp_world_size"} or not (dist.is_available() and dist.is_initialized()):
        return pairs
    config, origins, *_ = _core.resolve(pairs, False)
    peers = config["replication"]
    if dist.get_world_size() % peers:
        raise ConfigError(f"`replication` must divide the {dist.get_world_size()} ranks, found {peers}")
    found = config["dp_rank"], config["dp_world_size"]
    here = dist.get_rank() // peers, dist.get_world_size() // peers
    origin = origins["dp_rank"]
    if origin.startswith("FOREBAY_") or found == here:
        return pairs  # the former said on purpose, where peers of another kind of parallelism read the same rows
    if not origin.startswith("default"):
        raise ConfigError(
            f"rank {found[0]} of {found[1]} was found in {origin}, but torch.distributed says rank "
            f"{here[0]} of {here[1]}: give `dp_rank` and `dp_world_size`"
        )
    assumed = (
        f"assuming pure data parallel over {here[1]} ranks (from torch.distributed); where tensor-, context- or "
        "pipeline-parallel peers should read the same rows, set `mesh`, `replication`, or `dp_rank` and `dp_world_size`"
    )
    log_notes([], [assumed] if peers == 1 else [], here[0])
    return [*pairs, ("dp_rank", str(here[0])), ("dp_world_size", str(here[1]))]


_DATA_PARALLEL = ("dp_replicate", "dp_shard", "dp", "ddp", "fsdp", "data")


def _rank_in(mesh: Any) -> tuple[int, int]:
    """Data-parallel rank and size of this process in `mesh`; of several such dimensions the first varies slowest."""
    names = tuple(mesh.mesh_dim_names or ())
    dims = [dim for dim, name in enumerate(names) if name in _DATA_PARALLEL]
    if not dims and mesh.ndim == 1:
        dims = [0]
    if not dims:
        raise ConfigError(
            f"`mesh` needs a data-parallel dimension, named {', '.join(_DATA_PARALLEL)}; found {names or 'no names'}: "
            "pass the part of the mesh that is data-parallel, such as mesh['my_dp']"
        )
    rank, size = 0, 1
    for dim in dims:
        rank, size = rank * mesh.size(dim) + mesh.get_local_rank(dim), size * mesh.size(dim)
    return rank, size


def _made_here(core: _core.Batches, limit_s: float | None) -> tuple[int, Tensors] | None:
    batch = core.next(limit_s)
    return None if batch is None else (batch.step, _tensors(batch))


class _NativeIterator:
    """A pass of a native loader; several threads may take batches from it."""

    def __init__(self, owner: DataLoader[Any], loader: Loader) -> None:
        self._owner = owner
        core = loader._open_core()
        self._core = core.iter() if owner._allocator is None else core.iter_external()
        self._steps = core.len
        self._memory = None if owner._allocator is None else _Memory(self._core, owner._allocator)
        #: Step and tensors of the next batch in host memory, None at the end.
        self._take_on_host: Callable[[float | None], tuple[int, Tensors] | None] = functools.partial(
            _made_here, self._core
        )
        if self._memory is not None:
            self._take_on_host = self._memory.take
        elif _NATIVE is not None:
            self._take_on_host = functools.partial(self._core.next_tensors, _NATIVE)
        self._ahead = owner._ahead(self._take_on_host)
        self._take = self._take_on_host if self._ahead is None else self._ahead.take
        self._lock = threading.Lock()
        self._begun = False
        self._gradient_state: Any = None

    def __iter__(self) -> Self:
        return self

    def __len__(self) -> int:
        return finite(self._steps)

    def _begin(self) -> None:
        with self._lock:
            if self._begun:
                return
            owner = self._owner
            owner._follow_sampler()
            # Accelerate counts gradient accumulation by the loaders that are being iterated.
            accelerate = sys.modules.get("accelerate.state")
            if accelerate is not None:
                owner.end_of_dataloader = False
                self._gradient_state = accelerate.GradientState()
                self._gradient_state._add_dataloader(owner)
            self._begun = True

    def __next__(self) -> Tensors:
        # The label costs as much as handing a small batch over: only for a profiler that is looking.
        if not _profiler_enabled():
            return self._next()
        with torch.autograd.profiler.record_function("enumerate(DataLoader)#_NativeIterator.__next__"):
            return self._next()

    def _next(self) -> Tensors:
        if not self._begun:
            self._begin()
        limit_s = self._owner._limit_s
        try:
            found = self._take(limit_s)
        except TimeoutError:
            raise RuntimeError(f"DataLoader timed out after {limit_s} seconds") from None
        except BaseException:
            self._leave()
            raise
        if found is None:
            self._leave()
            raise StopIteration
        step, tensors = found
        if step + 1 == self._steps:
            self._owner.end_of_dataloader = True
        return tensors

    def _leave(self) -> None:
        with self._lock:
            state, self._gradient_state = self._gradient_state, None
        if state is not None:
            state._remove_dataloader(self._owner)

    def close(self) -> None:
        """Ends the pass and its threads."""
        self._leave()
        self._core.close()
        if self._ahead is not None:
            self._ahead.close()
        if self._memory is not None:
            self._memory.end()

    def __del__(self) -> None:
        if getattr(self, "_gradient_state", None) is not None:
            self._leave()


class _Source:
    """A pass as consumers share it."""

    def __init__(self, owner: DataLoader[Any]) -> None:
        self._owner = owner
        self._iterator = _NativeIterator(owner, owner._loader)

    def take(self, limit_s: float | None) -> Tensors | None:
        found = self._iterator._take_on_host(limit_s)
        return None if found is None else found[1]

    def close(self) -> None:
        self._iterator.close()


class _Whole(WholeLoader[Tensors]):
    """A native loader as its consumers see it."""

    def __init__(self, owner: DataLoader[Any]) -> None:
        super().__init__(owner._loader)
        self._owner = owner

    def begin(self) -> _Source:
        self._owner._follow_sampler()
        return _Source(self._owner)

    def cut(self, batch: Tensors, consumer: int, count: int) -> Tensors:
        return {name: self._rows(tensor, consumer, count) for name, tensor in batch.items()}

    def _rows(self, tensor: torch.Tensor, consumer: int, count: int) -> torch.Tensor:
        rows = tensor[consumer::count]
        if rows.is_contiguous() or not tensor.is_contiguous():
            return rows
        # Where the whole is one piece of memory, users rely on the part being one.
        pinned = self._owner.pin_memory and torch.cuda.is_available()
        return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=pinned).copy_(rows)


class _Memory:
    """Buffers for the batches of a pass, one for each, kept until their batch is handed over."""

    def __init__(self, core: _core.Batches, allocate: Callable[[int], torch.Tensor]) -> None:
        self._core = core
        self._allocate = allocate
        self._lock = threading.Lock()
        #: Submitted and not handed over, by address.
        self._buffers: dict[int, torch.Tensor] = {}
        self._takers = 0
        self._ended = False

    def take(self, limit_s: float | None) -> tuple[int, Tensors] | None:
        """Step and tensors of the next batch, None at the end."""
        with self._lock:
            # All that can fail comes before a batch is taken, which would be lost.
            while not self._ended and len(self._buffers) <= self._core.buffers_wanted + self._takers:
                self._submit()
            self._takers += 1
        try:
            batch = self._core.next(limit_s)
            if batch is None:
                self._ended = True
                return None
            buffer = self._buffers.pop(batch.address)
            return batch.step, {field[0]: _view(buffer, *field[1:]) for field in batch.layout()}
        finally:
            with self._lock:
                self._takers -= 1
                self._let_go()

    def end(self) -> None:
        """Lets buffers go that no batch will come in."""
        with self._lock:
            self._ended = True
            self._let_go()

    def _submit(self) -> None:
        buffer = self._allocate(self._core.batch_bytes)
        address = buffer.data_ptr()
        # First noted: once submitted, it may be another taker's.
        self._buffers[address] = buffer
        try:
            self._core.submit(address, buffer.nbytes, buffer)
        except BaseException:
            del self._buffers[address]
            raise

    def _let_go(self) -> None:
        # Another taker may have a batch and look for its buffer.
        if self._ended and self._takers == 0:
            self._buffers.clear()


def _view(buffer: torch.Tensor, dtype: str, offset: int, shape: list[int], stride: int) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    columns = shape[1] if len(shape) == 2 else 1
    nbytes = ((shape[0] - 1) * stride + columns) * kind.itemsize
    return buffer[offset : offset + nbytes].view(kind).as_strided(shape, (stride, 1)[: len(shape)])
