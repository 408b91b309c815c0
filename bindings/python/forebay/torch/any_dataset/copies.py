"""Copies an iterable dataset for a thread. Data that could change is copied, large data is shared.

A worker process of torch has its own memory. A thread needs its own buffers, positions and
generators instead.

- Arrays and tensors of 1 MiB or more are shared. So are read-only arrays, and the tables of pyarrow
  and polars.
- A container of more than 10,000 items is copied, but its items are shared.
- Locks, files, connections and all other objects that cannot be copied are shared.
- An iterator that cannot be copied, such as a generator, is refused. It is a position that threads
  would share.

A dataset with ``__copy__`` or ``__deepcopy__`` is copied by that method.
"""

from __future__ import annotations

import collections
import copy
import copyreg
import io
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

LARGE_BYTES = 1 << 20
LARGE_ITEMS = 10_000

_ATOMIC = frozenset(
    {
        type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis), type(NotImplemented), property,
        types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.CodeType, weakref.ref,
        torch.dtype, torch.device, torch.Size,
    }
)  # fmt: skip
_SHARED_PACKAGES = frozenset({"pyarrow", "polars", "tokenizers"})


def copied_for_thread(dataset: Any) -> Any:
    """Returns a copy of `dataset` that one thread may change."""
    kind = type(dataset)
    if hasattr(kind, "__deepcopy__"):
        return copy.deepcopy(dataset)
    if hasattr(kind, "__copy__"):
        return copy.copy(dataset)
    return _Copier(kind.__name__).copied(dataset)


class _Copier:
    def __init__(self, name: str) -> None:
        self._name = name
        #: Copies by the `id` of the original, in the form that ``__deepcopy__`` takes.
        self._made: dict[int, Any] = {}
        #: Every original stays alive, so that no `id` is used twice.
        self._alive: list[Any] = []

    def copied(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMIC or isinstance(value, type):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        found = self._copied_new(value, kind)
        if found is not value:
            self._made[id(value)] = found
            self._alive.append(value)
        return found

    def _copied_new(self, value: Any, kind: type) -> Any:
        if kind.__module__.partition(".")[0] in _SHARED_PACKAGES or isinstance(value, io.IOBase):
            return value
        if isinstance(value, np.ndarray) and value.dtype != object:
            return value if value.nbytes >= LARGE_BYTES or not value.flags.writeable else copy.deepcopy(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if kind is torch.Generator:
            return _generator(value)
        if kind is bytearray:
            return value if len(value) >= LARGE_BYTES else bytearray(value)
        if kind in (list, dict, set, collections.deque):
            return self._container(value, kind)
        if kind is tuple:
            items = [self.copied(item) for item in value]
            same = all(new is old for new, old in zip(items, value, strict=True))
            # An item may hold the tuple itself. Then the tuple is copied already.
            return value if same else self._made.get(id(value), tuple(items))
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self.copied(value.__self__))
        return self._object(value, kind)

    def _tensor(self, value: torch.Tensor) -> Any:
        if value.layout != torch.strided or value.is_meta or value.nbytes >= LARGE_BYTES:
            return value
        if value.requires_grad and not value.is_leaf:
            return value  # torch copies no part of a graph
        return copy.deepcopy(value)

    def _container(self, value: Any, kind: type) -> Any:
        if len(value) > LARGE_ITEMS or _is_atomic(value):
            return value.copy()
        if kind is dict:
            made: Any = {}
            self._note(value, made)
            made.update((self.copied(key), self.copied(item)) for key, item in list(value.items()))
            return made
        made = collections.deque(maxlen=value.maxlen) if kind is collections.deque else kind()
        self._note(value, made)
        add = made.add if kind is set else made.append
        for item in list(value):
            add(self.copied(item))
        return made

    def _note(self, value: Any, made: Any) -> None:
        # The copy is noted before it is filled, because its items may refer to it.
        self._made[id(value)] = made
        self._alive.append(value)

    def _object(self, value: Any, kind: type) -> Any:
        own: Any = getattr(kind, "__deepcopy__", None)
        try:
            if own is not None:
                return own(value, self._made)
            reducer = copyreg.dispatch_table.get(kind)
            reduced = reducer(value) if reducer is not None else value.__reduce_ex__(4)
        except Exception as error:
            if isinstance(value, Iterator):
                raise TypeError(
                    f"{self._name} holds a {kind.__name__}, which cannot be copied, so that all threads would take "
                    "items from the same one: make it in `__iter__`, or give the dataset a `__copy__`"
                ) from error
            return value
        return value if isinstance(reduced, str) else self._rebuilt(value, *reduced)

    def _rebuilt(
        self,
        value: Any,
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        state: Any = None,
        items: Any = None,
        pairs: Any = None,
        set_state: Any = None,
    ) -> Any:
        made = make(*[self.copied(argument) for argument in arguments])
        self._note(value, made)
        if state is not None:
            state = self.copied(state)
            if set_state is not None:
                set_state(made, state)
            elif hasattr(made, "__setstate__"):
                made.__setstate__(state)
            else:
                attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                if attributes:
                    made.__dict__.update(attributes)
                for name, item in (slots or {}).items():
                    setattr(made, name, item)
        for item in items or ():
            made.append(self.copied(item))
        for key, item in pairs or ():
            made[self.copied(key)] = self.copied(item)
        return made


def _is_atomic(value: Any) -> bool:
    kinds = set(map(type, value))
    if isinstance(value, dict):
        kinds.update(map(type, value.values()))
    return kinds <= _ATOMIC


def _generator(value: torch.Generator) -> torch.Generator:
    made = torch.Generator(device=value.device)
    made.set_state(value.get_state())
    return made
