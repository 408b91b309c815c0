"""The exceptions of forebay.

All have one base. Most are also the built-in exception that users expect. The core raises them by
name.
"""

from __future__ import annotations


class ForebayError(Exception):
    """Base of every exception of forebay. The causes are in ``__notes__``."""

    #: Shard with the fault. None if the fault has no place in the data.
    path: str | None = None
    #: Block in the shard, from 0.
    block: int | None = None
    #: Row in the shard, from 0.
    row: int | None = None


class ConfigError(ForebayError, ValueError):
    """A setting, an argument or an environment variable has a value that cannot be used."""


class DataError(ForebayError, ValueError):
    """A shard is damaged, has an unsupported type, or has changed since it was opened."""


class StateMismatchError(ForebayError, ValueError):
    """A saved state belongs to another corpus or to other content settings."""


class NotFoundError(ForebayError, FileNotFoundError):
    """No shard was found, or a file does not exist."""


class ReadError(ForebayError, OSError):
    """The operating system failed to open, map or read a file."""


class ClosedError(ForebayError, RuntimeError):
    """The loader was closed, or a forked child of its process uses it."""


class InternalError(ForebayError, RuntimeError):
    """Forebay has a defect, such as a panic in a worker."""


for _class in (
    ForebayError,
    ConfigError,
    DataError,
    StateMismatchError,
    NotFoundError,
    ReadError,
    ClosedError,
    InternalError,
):
    _class.__module__ = "forebay"
