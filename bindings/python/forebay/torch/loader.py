"""The stand-in for ``torch.utils.data.DataLoader``.

It chooses between the native way and the Python way.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsFloat, SupportsIndex, TypeVar, cast, overload

import torch
import torch.utils.data
from torch.utils.data import Dataset, DistributedSampler, Sampler, _DatasetKind

from forebay import _core
from forebay._errors import ConfigError
from forebay._loader import Data, Loader, Skip, first_time
from forebay._shown import Plan, Stats, table
from forebay._split import Consumer, Split
from forebay._transform import Transform
from forebay.torch.any_dataset.iterator import DatasetIterator
from forebay.torch.any_dataset.order import State, is_plain
from forebay.torch.any_dataset.state import Failed, Resume
from forebay.torch.any_dataset.waits import Waits
from forebay.torch.dataset import TokenDataset
from forebay.torch.device import Ahead, Cuda, Handed, Link
from forebay.torch.native import Native, NativeIterator, Rows
from forebay.torch.pinned import pinned
from forebay.torch.ranks import dimensions_of, process_group, sampler_facts
from forebay.torch.tensors import Tensors, tensors_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from forebay.torch import batches
    from forebay.torch.keywords import TorchKeywords

_T_co = TypeVar("_T_co", covariant=True)

_UNPINNED = "'pin_memory' argument is set as true but no accelerator is found, then device pinned memory won't be used."


class DataLoader(torch.utils.data.DataLoader[_T_co]):
    """A ``torch.utils.data.DataLoader`` without worker processes.

    It takes the same arguments, and forebay's settings as further keywords.

    A ``TokenDataset`` goes the native way if there is no ``batch_sampler``, no ``collate_fn``, and
    no sampler other than a ``DistributedSampler``. Batches are then dicts of tensors with shape
    ``(batch_size, seq_len)``, of type int64 by default. On the native way:

    - ``num_workers=0`` means the default number of threads.
    - ``worker_init_fn``, ``persistent_workers`` and ``in_order`` have no effect.
    - ``drop_last=False`` delivers the tail: in a short batch on one rank, and padded on several.
    - ``pin_memory=True`` fills torch's page-locked memory directly.
    - ``dataset`` is an iterable over the same rows, one by one. ``dataset.tokens`` is the
      TokenDataset.

    Every other dataset goes the Python way, where ``num_workers`` counts threads. Batches come in
    order. Exceptions keep their type and their traceback. ``torch.utils.data.get_worker_info()``
    answers for each thread. Map-style datasets resume with any ``num_workers``, iterable datasets
    with the same number. docs/torch.md lists all differences from torch.

    A setting wins over the parameter of torch with the same meaning: ``remainder`` over
    ``drop_last``, ``num_threads`` over ``num_workers``, ``prefetch_batches`` over
    ``prefetch_factor``, and ``seed`` over the sampler's seed and ``generator.initial_seed()``. The
    rank is ``dp_rank``, or the rank of ``mesh``, of the sampler, of the launcher or of
    torch.distributed, in this order. The default is rank 0 of 1.

    Parameters
    ----------
    mesh:
        A ``torch.distributed.device_mesh.DeviceMesh``. Only ranks that differ in its data-parallel
        dimensions read different rows. These are the dimensions named ``dp``, ``dp_replicate``,
        ``dp_shard``, ``fsdp``, ``ddp`` or ``data``, or its only dimension. Default: None.
    transform:
        A function that takes a batch and returns another. It runs on `transform_threads` Python
        threads of its own, between the loader and the consumer. Batches stay in order. With
        `device`, it runs before the copy. Default: None.
    device:
        A CUDA device. Batches are copied to it on a stream of their own, and are safe to use on the
        current stream. It implies ``pin_memory``. Default: None, which leaves batches in host
        memory.
    device_prefetch:
        Number of batches copied ahead of the batch that was handed over. Default: 2.

    Other Parameters
    ----------------
    vocab_size:
        Number of ids of the tokenizer. A batch with another id is an error with file, block and
        row. `none` checks only that no id is negative. Default: none. Accepted: an integer from 1
        to 2^31, or `none`.
    seed:
        Key of the order, together with the epoch. `forebay.torch.DataLoader` takes it from the
        sampler or the generator if you give none. Default: 0. Accepted: an integer from 0 to 2^64 -
        1.
    chunk_tokens:
        Tokens in a chunk. Block shuffling permutes the chunks of the corpus. Default: 4Mi.
        Accepted: a number of tokens from 1 to 2^48, such as `1Mi`.
    window_tokens:
        Tokens in the windows of all lanes together. Block shuffling permutes the sequences of a
        window. Default: 16Mi. Accepted: a number of tokens from 1 to 2^48, such as `16Mi`.
    lanes:
        Virtual shards that block shuffling interleaves. World sizes that divide it decode each
        block about once. Default: 8. Accepted: an integer from 1 to 2^20.
    skip:
        Positions that are never delivered. All others keep their numbers. Default: none. Accepted:
        a list of `(start, end)` or `(epoch, start, end)`, as text `100-200,3:0-50` (epoch 0 and
        epoch 3), or `none`.
    extend:
        Continues a state of the first shards of this corpus. The new shards join at the next epoch.
        Default: false.
    dp_rank:
        Data-parallel rank. `none` takes it from the launcher, else 0. Default: none. Accepted: an
        integer below `dp_world_size`, or `none`.
    dp_world_size:
        Number of data-parallel ranks. `none` takes it from the launcher, else 1. Default: none.
        Accepted: an integer from 1 to 2^32, or `none`.
    model_parallel_size:
        Neighbouring ranks of the launcher that read the same rows: tensor-, context- and
        pipeline-parallel peers. Default: 1. Accepted: an integer from 1 to 2^32.
    epochs:
        Epochs of one pass. With more than one, batches run on across their borders. Default: 1.
        Accepted: an integer from 1 to 2^32, or `endless`.
    max_steps:
        Steps after which a pass ends, counted from the start of its first epoch. Default: none.
        Accepted: an integer from 1, or `none`.
    remainder:
        Rule for the tokens and sequences at an epoch's end that fill no whole sequence or global
        batch. `drop`: They are left out, and counted. `pad`: They are delivered in full rows and
        batches, filled up with `pad_id` and ignored labels. `wrap`: They are filled up from the
        start of the epoch. `short`: The last batch has fewer rows. This is refused if a rank would
        have none. Default: drop. Accepted: `drop`, `pad`, `wrap` or `short`.
    balance:
        Rule that moves rows between ranks. It needs ranks that can read each other's rows without
        decoding more. `off`: Rows stay where the order puts them. `ranks`: The rows of each global
        batch are permuted, so that ranks get about equal sums of squared document lengths. Default:
        off. Accepted: `off` or `ranks`.
    pad_id:
        Id that fills padded rows. Their labels are `ignore_index`. Default: 0. Accepted: an id
        below 2^31.
    batch_format:
        Names, shapes and types of the arrays of a batch, as a trainer takes them. It decides
        `targets` if you do not set it. `none` gives the arrays that `targets` names. Default: none.
        Accepted: `hf`, `hf-packed`, `titan`, `megatron`, `olmo`, `xy` or `jax`, or `none`.
    sample_ids:
        Adds the place of each row to the batch: `source` and `sample_index`, int64 of shape
        `(batch_size,)`, -1 for padding. Default: false.
    num_threads:
        Worker threads. With 0, the thread that asks for a batch computes it. `none` takes the CPUs
        of this rank less one, from 1 to 8. Default: none. Accepted: an integer from 0 to 1024, or
        `none`.
    cpu_affinity:
        CPUs that worker threads may run on, as `0,2-5` or a list. Linux only. `none` allows all
        CPUs of the process. Default: none. Accepted: CPUs such as `0,2-5`, or `none`.
    thread_priority:
        Number added to the `nice` value of worker threads, so that they take less from a trainer on
        the same CPUs. Linux only. Default: 0. Accepted: an integer from 0 to 19.
    prefetch_batches:
        Batches computed ahead of the consumer. Default: 4. Accepted: an integer from 1 to 65536.
    transform_threads:
        Threads that run the function `transform` of a loader. `none` takes 1 where one thread at a
        time runs Python, and else `num_threads`. Default: none. Accepted: an integer from 1 to
        1024, or `none`.
    memory_budget:
        Memory for decoded blocks and batches in flight. Default: 512MiB. Accepted: a number of
        bytes, such as `512MiB` or `1GB`.
    block_tokens:
        Approximate number of tokens in a block that is decoded at once. It never changes a batch.
        Default: 128Ki. Accepted: a number of tokens from 1 to 2^31, such as `128Ki`.
    io:
        Access to file bytes. `auto`: Files are mapped on local file systems, and read by position
        on network and FUSE ones. `mmap`: Files are always mapped. `pread`: Files are always read by
        position. Default: auto. Accepted: `auto`, `mmap` or `pread`.
    on_error:
        Rule for rows that cannot be read. `raise`: The batch of the row is an error, and so is the
        rest of the pass. `retry`: Passing errors of files are tried again for half a minute, in
        place of a second. Damage is an error. `substitute`: A damaged row is replaced by another
        row of its source. Seed, epoch and row decide which, so all ranks, restarts and numbers of
        threads choose alike. Default: raise. Accepted: `raise`, `retry` or `substitute`.
    max_substitutions:
        Rows of this rank that a loader may replace, with `on_error` = substitute. The batch with
        one more such row is an error. Default: 100. Accepted: an integer from 0 to 2^32.
    index_dir:
        Folder for the saved index of the corpus, which nodes may share. With it, shards are opened
        when they are first read. `none` takes `cache_dir`. Without both, all are opened at the
        start. Default: none. Accepted: a folder, or `none`.
    cache_dir:
        Folder on a local disk that keeps what was read from object stores. The processes of a node
        share it. Without `index_dir` it holds the saved index too. Default: none. Accepted: a
        folder, or `none`.
    cache_bytes:
        Limit of the bytes from object stores that `cache_dir` keeps. Default: 100GiB. Accepted: a
        number of bytes, such as `512MiB` or `1GB`.
    storage_endpoint:
        URL of a server that speaks the protocol of the object store, such as MinIO. `none` takes it
        from the store's own variables and files, else the store's own server. Default: none.
        Accepted: a URL, or `none`.
    storage_region:
        Region of the S3 buckets. `none` takes it from the standard variables and files. Default:
        none. Accepted: a name, or `none`.
    storage_anonymous:
        Reads public buckets without credentials. Default: false.
    storage_timeout:
        Seconds after which a request to an object store fails, all its tries included. Default:
        120. Accepted: an integer from 1 to 86400.
    storage_requests:
        Limit of the requests that a process has in flight at an object store. Default: 32.
        Accepted: an integer from 1 to 4096.
    service:
        Addresses of a service that computes the batches in place of this process: `unix:PATH`,
        `grpc://HOST:PORT` or `grpc+tls://HOST:PORT`. If a service does not answer, the loader takes
        the next address. Batches and states are the same as without a service. Default: none.
        Accepted: addresses such as `unix:PATH`, `grpc://HOST:PORT` and `grpc+tls://HOST:PORT`, or
        `none`.
    service_timeout:
        Seconds that a loader waits for a service before it fails. It tries all addresses meanwhile.
        Default: 60. Accepted: an integer from 1 to 86400.
    service_fallback:
        Computes batches in this process while no service answers. Needs local data, and `index_dir`
        or `cache_dir`. Takes a further `memory_budget` while it does so. Default: false.
    delivery_log:
        Folder where every rank writes a line for each batch it hands over. `forebay verify` proves
        the run from it. Default: none. Accepted: a folder, or `none`.

    Raises
    ------
    ConfigError
        A setting cannot be used, or the launcher's rank differs from the rank of torch.distributed.
    """

    if TYPE_CHECKING:
        # The type of a batch follows from its format.
        @overload
        def __init__(
            self: DataLoader[batches.HfPackedTensors],
            dataset: TokenDataset,
            batch_size: int = 1,
            shuffle: Any = ...,
            *,
            batch_format: Literal["hf-packed"],
            transform: None = ...,
            **settings: Unpack[TorchKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: DataLoader[batches.TitanTensors],
            dataset: TokenDataset,
            batch_size: int = 1,
            shuffle: Any = ...,
            *,
            batch_format: Literal["titan"],
            transform: None = ...,
            **settings: Unpack[TorchKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: DataLoader[batches.OlmoTensors],
            dataset: TokenDataset,
            batch_size: int = 1,
            shuffle: Any = ...,
            *,
            batch_format: Literal["olmo"],
            transform: None = ...,
            **settings: Unpack[TorchKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: DataLoader[batches.XyTensors],
            dataset: TokenDataset,
            batch_size: int = 1,
            shuffle: Any = ...,
            *,
            batch_format: Literal["xy"],
            transform: None = ...,
            **settings: Unpack[TorchKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: DataLoader[Tensors],
            dataset: TokenDataset,
            batch_size: int = 1,
            shuffle: Any = ...,
            *,
            batch_format: Any = ...,
            transform: None = ...,
            **settings: Unpack[TorchKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self: DataLoader[_T_co],
            dataset: TokenDataset,
            batch_size: int = 1,
            shuffle: Any = ...,
            *,
            batch_format: Any = ...,
            transform: Callable[[Any], _T_co],
            **settings: Unpack[TorchKeywords],
        ) -> None: ...
        @overload
        def __init__(
            self,
            dataset: Dataset[_T_co],
            batch_size: int | None = 1,
            shuffle: Any = ...,
            sampler: Sampler[Any] | Iterable[Any] | None = ...,
            batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = ...,
            num_workers: int = 0,
            collate_fn: Callable[[list[Any]], Any] | None = ...,
            pin_memory: bool = False,
            drop_last: bool = False,
            timeout: float = 0,
            worker_init_fn: Callable[[int], None] | None = ...,
            multiprocessing_context: Any = ...,
            generator: torch.Generator | None = ...,
            *,
            prefetch_factor: int | None = ...,
            persistent_workers: bool = False,
            pin_memory_device: str = "",
            in_order: bool = True,
            device: str | torch.device | None = ...,
            device_prefetch: int = 2,
            _allocator: Callable[[int], torch.Tensor] | None = ...,
            _link: Callable[[], Link] | None = ...,
        ) -> None: ...

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        # settings: `shuffle`, from `make generate`
        shuffle: bool | Literal["global", "block"] | None = None,
        # settings: end
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
        mesh: Any = None,
        # settings: keywords, from `make generate`
        vocab_size: int | None = None,
        seed: int | None = None,
        chunk_tokens: int | None = None,
        window_tokens: int | None = None,
        lanes: int | None = None,
        skip: Skip | None = None,
        extend: bool | None = None,
        dp_rank: int | None = None,
        dp_world_size: int | None = None,
        model_parallel_size: int | None = None,
        epochs: int | Literal["endless"] | None = None,
        max_steps: int | None = None,
        remainder: Literal["drop", "pad", "wrap", "short"] | None = None,
        balance: Literal["off", "ranks"] | None = None,
        pad_id: int | None = None,
        batch_format: Literal["hf", "hf-packed", "titan", "megatron", "olmo", "xy", "jax"] | None = None,
        sample_ids: bool | None = None,
        num_threads: int | None = None,
        cpu_affinity: str | Iterable[int] | None = None,
        thread_priority: int | None = None,
        prefetch_batches: int | None = None,
        transform_threads: int | None = None,
        memory_budget: int | None = None,
        block_tokens: int | None = None,
        io: Literal["auto", "mmap", "pread"] | None = None,
        on_error: Literal["raise", "retry", "substitute"] | None = None,
        max_substitutions: int | None = None,
        index_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        storage_endpoint: str | None = None,
        storage_region: str | None = None,
        storage_anonymous: bool | None = None,
        storage_timeout: int | None = None,
        storage_requests: int | None = None,
        service: str | Iterable[str] | None = None,
        service_timeout: int | None = None,
        service_fallback: bool | None = None,
        delivery_log: str | os.PathLike[str] | None = None,
        # settings: end
        transform: Transform | None = None,
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
        if isinstance(dataset, (str, os.PathLike)):
            raise TypeError(
                f"`dataset` must be a dataset, found a path; write DataLoader(TokenDataset({dataset!r}), ...)"
            )
        link = _link_to(device) if _link is None else _link
        pin_memory = pin_memory or (link is not None and _link is None)
        settings: dict[str, Any] = dict(
            # settings: values, from `make generate`
            vocab_size=vocab_size,
            seed=seed,
            chunk_tokens=chunk_tokens,
            window_tokens=window_tokens,
            lanes=lanes,
            skip=skip,
            extend=extend,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            model_parallel_size=model_parallel_size,
            epochs=epochs,
            max_steps=max_steps,
            remainder=remainder,
            balance=balance,
            pad_id=pad_id,
            batch_format=batch_format,
            sample_ids=sample_ids,
            num_threads=num_threads,
            cpu_affinity=cpu_affinity,
            thread_priority=thread_priority,
            prefetch_batches=prefetch_batches,
            transform_threads=transform_threads,
            memory_budget=memory_budget,
            block_tokens=block_tokens,
            io=io,
            on_error=on_error,
            max_substitutions=max_substitutions,
            index_dir=index_dir,
            cache_dir=cache_dir,
            cache_bytes=cache_bytes,
            storage_endpoint=storage_endpoint,
            storage_region=storage_region,
            storage_anonymous=storage_anonymous,
            storage_timeout=storage_timeout,
            storage_requests=storage_requests,
            service=service,
            service_timeout=service_timeout,
            service_fallback=service_fallback,
            delivery_log=delivery_log,
            # settings: end
        )
        native = (
            is_plain(dataset, TokenDataset, "__getitem__", "__getitems__", "__len__")
            and (sampler is None or is_plain(sampler, DistributedSampler, "__iter__", "__len__"))
            and batch_sampler is None
            and collate_fn is None
            and batch_size is not None
        )
        self._native: Native | None = None
        if not native:
            given = [name for name, value in (settings | {"transform": transform}).items() if value is not None]
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
            self._resume, self._waits = Resume(), Waits()
            self._bind_state(link, device_prefetch)
            return

        assert isinstance(dataset, TokenDataset)
        follows = sampler if isinstance(sampler, DistributedSampler) else None
        if follows is not None:
            if shuffle:
                raise ValueError("sampler option is mutually exclusive with shuffle")
            shuffle = follows.shuffle
        settings.update(shuffle=shuffle, batch_size=batch_size, pin_memory=pin_memory or None)
        facts: _core.Torch = {
            "drop_last": bool(drop_last),
            "num_workers": operator.index(num_workers),
            "prefetch_factor": prefetch_factor,
            "generator_seed": None if generator is None else generator.initial_seed(),
            "sampler": None if follows is None else sampler_facts(follows),
            "mesh": None if mesh is None else dimensions_of(mesh),
            "process_group": process_group(),
        }
        resolved = _core.Settings({**dataset._given, **_core.typed(settings)}, from_env=True, torch=facts)

        allocator = _allocator
        pin_memory = resolved.values()["pin_memory"]
        if pin_memory and allocator is None:
            if torch.cuda.is_available():
                allocator = pinned
            elif first_time(_UNPINNED):
                warnings.warn(_UNPINNED, stacklevel=2)
        loader = Loader._of(resolved, can_pin=True, transform=transform)
        self._native = Native(loader, allocator, timeout or None, sampler)
        self.dataset = Rows(loader, dataset)  # type: ignore[assignment]
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = 0
        self.prefetch_factor = None
        self.pin_memory = pin_memory
        self.pin_memory_device = pin_memory_device
        # A caller may build a loader of torch from these attributes. It must not set a limit for
        # workers, because it has none.
        self.timeout = 0
        self.worker_init_fn = None
        self.in_order = in_order
        self.drop_last = loader.config["remainder"] == "drop"
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

    @classmethod
    def from_env(cls, data: Data | None = None, **settings: Any) -> Self:
        """Opens a native loader. Every setting may come from the environment or the file.

        The arguments win over both. They are the arguments of ``TokenDataset``, and those of this
        class as keywords. The constructor reads the environment in the same way, except for the
        data and the batch size, which it takes as arguments.
        """
        own, of_dataset = (set(inspect.signature(kind).parameters) for kind in (cls, TokenDataset))
        unknown = set(settings) - own - of_dataset
        if unknown:
            raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}")
        given = {name: value for name, value in settings.items() if name in of_dataset}
        others = {name: value for name, value in settings.items() if name not in of_dataset}
        if "batch_size" not in others:
            settings_here = _core.Settings({"data": data, **given}, from_env=True)
            others["batch_size"] = settings_here.values()["batch_size"]
        dataset: Any = TokenDataset(data, **given)
        return cls(dataset, **others)

    def _bind_state(self, link: Callable[[], Link] | None, device_prefetch: int) -> None:
        self._link = link
        self.device_prefetch = device_prefetch
        self._handed: Handed | None = None
        # Wrappers of Lightning Fabric and Ray copy `__dict__`, and ask the copy. Methods of a
        # subclass count.
        self.__dict__.update(state_dict=self.state_dict, load_state_dict=self.load_state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the batches that the newest pass handed over."""
        if self._handed is None:
            return self._state_taken()
        if isinstance(self._handed.state, Failed):
            raise self._handed.state.error
        return dict(self._handed.state)

    def _state_taken(self) -> State:
        """Returns the position after the batches that were taken.

        On the way to a device, these are more batches than were handed over.
        """
        return self._resume.state(self) if self._native is None else self._native.loader.state_dict()

    def _state_ahead(self) -> State | Failed:
        try:
            return self._state_taken()
        except Exception as error:
            return Failed(error)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Lets the next pass continue at a position that ``state_dict`` returned.

        An empty dict changes nothing.

        Raises
        ------
        StateMismatchError
            The state belongs to another dataset, or to another kind of loader. Both values are
            named.
        TypeError
            The state is not a mapping.
        """
        if isinstance(state_dict, Mapping) and not state_dict:
            return
        if self._native is None:
            self._resume.load(self, state_dict)
        else:
            self._native.loader.load_state_dict(state_dict)
        self._handed = None

    def _begun_ahead(self, handed: Handed) -> None:
        self._handed = handed

    def _ahead(self, take: Callable[[float | None], Any]) -> Ahead | None:
        """Returns the copier that brings the batches of a new pass to the device.

        None without device.
        """
        if self._link is None:
            return None
        return Ahead(self._link(), take, self._state_ahead, self._begun_ahead, self.device_prefetch)

    def __getstate__(self) -> dict[str, Any]:
        kept = self.__dict__.copy()
        if self._native is None:
            # A loader whose dataset cannot give its state is copied without a position.
            state = self._state_ahead() if self._handed is None else self._handed.state
            kept["_waits"] = Waits()
            kept["_resume"] = Resume(None if isinstance(state, Failed) or not state["batches"] else state)
        del kept["state_dict"], kept["load_state_dict"]
        return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)
        handed = self._handed
        self._bind_state(self._link, self.device_prefetch)
        if self._native is not None and handed is not None:
            self._native.loader.load_state_dict(handed.state)

    @property
    def _loader(self) -> Loader[Any]:
        if self._native is None:
            raise TypeError("only a native loader can do this: one of a TokenDataset without own sampling or collating")
        return self._native.loader

    def __iter__(self) -> batches.Pass[_T_co]:  # type: ignore[override]
        """Makes a new pass, which begins at its first ``next()``."""
        if self._native is not None:
            return NativeIterator(self._native, self, self._ahead)
        return DatasetIterator(self, self._resume, self._ahead)

    def __len__(self) -> int:
        """Returns the number of batches of this rank in an epoch."""
        return len(self._native.loader) if self._native is not None else super().__len__()

    @property
    def multiprocessing_context(self) -> None:
        """None, because there are no processes. Setting another value is an error."""
        return None

    @multiprocessing_context.setter
    def multiprocessing_context(self, context: Any) -> None:
        if context is not None:
            raise ValueError(
                "`multiprocessing_context` has no meaning here: workers are threads of this process; leave it out"
            )

    def check_worker_number_rationality(self) -> None:
        """Does nothing. In torch it warns of too many processes."""

    def set_epoch(self, epoch: int) -> None:
        """Lets the next pass begin this epoch.

        A restored position of this epoch stays in force until a pass has continued it. On the
        Python way, every sampler and dataset with this method is told the epoch, also inside of
        others.
        """
        if self._native is not None:
            self._native.loader.set_epoch(epoch)
            return
        self._resume.set_epoch(self, epoch)

    def split(self, count: int, *, ahead: int | None = None) -> list[Consumer[_T_co]]:
        """Shares this loader among `count` consumers, one per thread. Native loaders only.

        The consumers share this loader's threads, files and decoded blocks. Each consumer is a rank
        of its own. Consumer `i` gets every `count`-th row of each batch, from the `i`-th row on.
        Rank ``dp_rank + i * dp_world_size`` of ``dp_world_size * count`` ranks gets the same rows
        with a `count`-th of the batch size.

        A consumer may be `ahead` batches before the slowest one (default: ``prefetch_batches``).
        Then it waits. ``state_dict`` gives the position after the last batch that all consumers
        have.

        Raises
        ------
        ConfigError
            Rows cannot be dealt out evenly: `batch_size` is not a multiple of `count`, or a last
            batch may be short.
        """
        loader, native = self._loader, self._native
        assert native is not None
        if self._link is not None:
            raise ConfigError("`device` is one device: leave it out, and copy in the thread of each consumer")
        core = loader._open_core().split(count, ahead, native.allocator is not None)
        split = Split(self, core, count, native.take_part, native.follow_sampler)
        loader._split = split
        return split.consumers

    def seek(self, position: int, epoch: int | None = None) -> None:
        """Lets the next pass begin at `position` of `epoch`. Native loaders only.

        The default is the present epoch.
        """
        self._loader.seek(position, epoch)
        self._handed = None

    def sequences_at(self, epoch: int, position: int, n: int = 1) -> Tensors:
        """Returns the rows at `n` positions of an epoch's order, from `position` on, over all
        ranks.

        Native loaders only.
        """
        return tensors_of(self._loader._open_core().sequences_at(epoch, position, n))

    def batch_at(
        self, step: int, epoch: int | None = None, rank: int | None = None, world_size: int | None = None
    ) -> _T_co:
        """Returns the batch that a rank gets at a step of the pass that begins with `epoch`.

        The defaults are this loader's epoch and ranks. `transform` does not run on it. Native
        loaders only.
        """
        batch = tensors_of(self._loader._open_core().batch_at(step, epoch, rank, world_size))
        form = None if self._native is None else self._native.format
        return cast(_T_co, batch if form is None else form(batch))

    @property
    def epoch(self) -> int:
        """Epoch of the newest pass. Native loaders only.

        After `set_epoch`, `seek` or `load_state_dict` it is the epoch of the next pass.
        """
        return self._loader.epoch

    @property
    def num_sequences(self) -> int:
        """Full sequences of the present epoch, over all ranks. Native loaders only.

        Raises TypeError if the epoch has no end.
        """
        return self._loader.num_sequences

    @property
    def num_tokens(self) -> int:
        """Tokens of the present epoch, special ids included. Native loaders only.

        Raises TypeError if the epoch has no end.
        """
        return self._loader.num_tokens

    @property
    def dropped_tokens(self) -> int:
        """Tokens of the present epoch that `remainder` leaves out, over all ranks.

        Native loaders only.
        """
        return self._loader.dropped_tokens

    @property
    def config(self) -> dict[str, Any]:
        """Every setting in force, by name. Native loaders only."""
        return self._loader.config

    @property
    def origins(self) -> dict[str, str]:
        """Origin of each setting: an argument, a variable, a file, the launcher, or the default.

        Native loaders only.
        """
        return self._loader.origins

    def stats(self) -> Stats:
        """Returns counters since the loader was opened. ``Stats`` tells their meaning and unit.

        Loaders of other datasets count only batches and waits.
        """
        return Stats(self._waits.stats()) if self._native is None else self._loader.stats()

    def plan(self) -> Plan:
        """Computes the size and cost of a pass: steps, remainder, memory, shuffling and decoding.

        Native loaders only.
        """
        return self._loader.plan()

    def verdict(self) -> str:
        """Tells in one line whether the loader or its consumers are slower."""
        return self._waits.verdict() if self._native is None else self._loader.verdict()

    def close(self) -> None:
        """Stops every pass. Batches that were handed over stay valid."""
        if self._native is not None:
            self._native.close()

    def __repr__(self) -> str:
        # Debuggers and test runners show an object even if its constructor failed.
        if "_native" not in self.__dict__:
            return f"<{type(self).__name__} that was not opened>"
        if self._native is None:
            return f"<{type(self).__name__} of any dataset, {self.num_workers} threads: {self.dataset!r}>"
        return repr(self._native.loader).replace("<Loader", f"<{type(self).__name__}", 1)

    def _repr_html_(self) -> str:
        name = type(self).__name__
        if self.__dict__.get("_native") is None:
            return table(name, ("", ""), [("", repr(self))])
        return table(name, ("", ""), self._loader._facts().items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _link_to(device: str | torch.device | None) -> Callable[[], Link] | None:
    """Makes the way to `device` for a pass. None for host memory."""
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
