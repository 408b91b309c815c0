"""How loaders, datasets, plans and stats show themselves in a terminal and in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Longest value of a row in a table.
MOST = 400


class Stats(dict[str, Any]):
    """Counters of a loader since it was opened, by name. It is a dict, so it can be stored as JSON.

    - ``batches`` (batches): batches that were handed over.
    - ``tokens`` (tokens): tokens of these batches, without padding.
    - ``padding_share`` (0 to 1): part of all places of these batches that holds no token.
    - ``truncated_documents`` (documents): documents of an epoch that lost their end, with
      ``overflow="truncate"``.
    - ``truncated_tokens`` (tokens): tokens of these ends.
    - ``dropped_documents`` (documents): documents of an epoch that were left out whole, with
      ``overflow="drop"``.
    - ``dropped_tokens`` (tokens): tokens of these documents.
    - ``substituted_rows`` (rows): rows of this rank that stand in the place of rows that cannot be
      read, with ``on_error="substitute"``.
    - ``bytes`` (bytes): size of the batches that were handed over.
    - ``elapsed_seconds`` (seconds): time since the first request for a batch.
    - ``tokens_per_second`` (tokens per second): `tokens` over `elapsed_seconds`.
    - ``bytes_per_second`` (bytes per second): `bytes` over `elapsed_seconds`.
    - ``wait_seconds`` (seconds): time that all consumers together waited for batches, or computed
      them.
    - ``wait_share`` (0 to 1): `wait_seconds` over `elapsed_seconds`.
    - ``wait_p50_seconds`` (seconds): median wait of the last 8192 requests.
    - ``wait_p99_seconds`` (seconds): wait that 99 % of the last 8192 requests did not exceed.
    - ``queue_depth_mean`` (batches): batches that were ready when a consumer asked, in the mean.
    - ``decode_seconds`` (seconds): time that each worker decoded blocks, or waited for another
      worker to decode one. The last value is the time of consumers that computed a batch.
    - ``fill_seconds`` (seconds): elapsed time in which each worker wrote rows. The last value is
      the time of consumers that computed a batch.
    - ``decoded_blocks`` (blocks): blocks that were decoded. A block that is decoded twice counts
      twice.
    - ``decoded_bytes`` (bytes): size of these blocks after decoding.
    - ``found_blocks`` (reads): reads of rows that found their block decoded, or being decoded.
    - ``decoded_pages`` (pages): pages of Parquet, by the decoder that read them. The value
      ``row_groups_by_arrow`` counts row groups that the arrow reader decoded.
    - ``cache_bytes`` (bytes): decoded blocks in memory now.
    - ``buffer_bytes`` (bytes): memory of batches now: in flight, held by consumers, and kept for
      reuse.
    - ``storage_requests`` (requests): requests that this process sent to object stores and web
      servers, those of other loaders included.
    - ``storage_bytes`` (bytes): size of their answers.
    - ``sources`` (list): `name`, `sequences`, `tokens`, `epochs` and `share` (0 to 1) of each
      source of a mixture, over all ranks.
    """

    def __repr__(self) -> str:
        return f"Stats({super().__repr__()})"

    def _repr_html_(self) -> str:
        meanings = meanings_of(self)
        rows = [(name, value, *meanings.get(name, ("", ""))) for name, value in self.items()]
        return table("Stats", ("name", "value", "unit", "meaning"), rows)


class Plan(dict[str, Any]):
    """The size and cost of a run, computed before it starts.

    It is a dict with these parts of the output of ``forebay plan --json``:

    - ``sources``: files, documents, tokens and sequences of each source, its order, and the
      distances in positions that shuffling moves sequences.
    - ``pass``: steps on each rank, rows and tokens of all ranks, and all that `remainder` leaves
      out or fills up.
    - ``decoding``: tokens decoded for each token that is delivered. None for files that are read in
      place.
    - ``memory``: bytes of batches, threads and decoded blocks on one rank, beside the budget.

    ``str(plan)`` gives the lines that ``forebay plan`` prints.
    """

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"<Plan\n{self._text}>"

    def _repr_html_(self) -> str:
        lines = [(line[:12].strip(), line[12:]) for line in self._text.splitlines()]
        return table("Plan", ("", ""), lines)


def meanings_of(stats: Stats) -> dict[str, tuple[str, str]]:
    """Unit and meaning of each value, from the docstring, which Python may have left out."""
    text = " ".join((type(stats).__doc__ or "").split())
    found = re.findall(r"- ``(\w+)`` \(([^)]*)\): (.*?)(?= - ``|$)", text)
    return {name: (unit, meaning.replace("`", "")) for name, unit, meaning in found}


def shown(value: Any) -> str:
    """A value as a table shows it: numbers with commas, long values cut."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(one, int | float) for one in value):
        return ", ".join(map(shown, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(one)}" for name, one in value.items())
    text = str(value)
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"


def table(title: str, heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table for notebooks. Every text is escaped."""

    def cells(tag: str, row: Iterable[Any]) -> str:
        style = ' style="text-align: left"'
        return "".join(f"<{tag}{style}>{html.escape(shown(value))}</{tag}>" for value in row)

    heads = list(heads)
    head = f"<thead><tr>{cells('th', heads)}</tr></thead>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption>{head}<tbody>{body}</tbody></table>"


def size_text(count: int | None, unit: str) -> str:
    return f"endless {unit}" if count is None else f"{count:,} {unit}"


def data_text(config: Mapping[str, Any]) -> str:
    """The corpus of a configuration in a few words."""
    data = config.get("data")
    if not data:
        return "a mixture" if config.get("mixture") else "no data"
    names = [data] if isinstance(data, str) or not isinstance(data, Iterable) else list(map(str, data))
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{shown(str(names[0]))}{rest}"
