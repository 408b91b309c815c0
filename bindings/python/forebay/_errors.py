"""Exceptions: one base, and beside it the built-in that users expect. The core raises them by name."""

from __future__ import annotations


class ForebayError(Exception):
    """Base of every exception of forebay. Causes are in ``__notes__``."""

    #: Shard that it happened in, if it has a place in the data.
    path: str | None = None
    #: Block of the shard, counted from 0.
    block: int | None = None
    #: Row of the shard, counted from 0.
    row: int | None = None


class ConfigError(ForebayError, ValueError):
    """A setting, an argument or an environment variable has an unusable value."""


class DataError(ForebayError, ValueError):
    """A shard is damaged, of an unsupported type, or no longer the file that was opened."""


class StateMismatchError(ForebayError, ValueError):
    """A saved state belongs to another corpus or to other content settings."""


class NotFoundError(ForebayError, FileNotFoundError):
    """No shard was found, or a file does not exist."""


class ReadError(ForebayError, OSError):
    """The operating system failed to open, map or read a file."""


class ClosedError(ForebayError, RuntimeError):
    """The loader was closed, or is used in a forked child of its process."""


class InternalError(ForebayError, RuntimeError):
    """A defect of forebay, such as a panic in a worker."""


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
