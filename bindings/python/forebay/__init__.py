"""Forebay: a token loader for LLM training.

It turns Parquet and Arrow shards into batches, in an exact and resumable order. ``Loader`` gives
NumPy arrays and never imports torch. ``forebay.torch`` gives tensors and stands in for torch's own
DataLoader.
"""

from forebay._core import __version__
from forebay._errors import (
    ClosedError,
    ConfigError,
    DataError,
    ForebayError,
    InternalError,
    NotFoundError,
    ReadError,
    StateMismatchError,
)
from forebay._loader import Batches, Loader
from forebay._shown import Plan, Stats

__all__ = [
    "Batches",
    "ClosedError",
    "ConfigError",
    "DataError",
    "ForebayError",
    "InternalError",
    "Loader",
    "NotFoundError",
    "Plan",
    "ReadError",
    "StateMismatchError",
    "Stats",
    "__version__",
]
