"""Order v1 in plain Python integers, written from its specification alone.

The Rust order must equal it.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
SMALL = 256
ROUNDS = 8


def mix64(z: int) -> int:
    """Finaliser of splitmix64."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def derive(key: int, *words: int) -> int:
    """Derives a separate key for every list of words."""
    for word in words:
        key = mix64(((key + GOLDEN) & MASK) ^ mix64(word & MASK))
    return key


@lru_cache(maxsize=4096)
def fisher_yates(key: int, n: int) -> tuple[int, ...]:
    """A permutation of `n` values as a table."""
    table = list(range(n))
    state = key
    for k in range(n - 1, 0, -1):
        state = (state + GOLDEN) & MASK
        j = (mix64(state) * (k + 1)) >> 64
        table[k], table[j] = table[j], table[k]
    return tuple(table)


@lru_cache(maxsize=4096)
def round_keys(key: int) -> tuple[int, ...]:
    return tuple(derive(key, 16 + r) for r in range(ROUNDS))


def feistel(key: int, n: int, i: int) -> int:
    """Mixed-radix Feistel network over `a * b >= n` values, walked until it lands below `n`."""
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    keys = round_keys(key)
    x = i
    while True:
        left, right = divmod(x, b)
        for r in range(ROUNDS):
            if r % 2 == 0:
                left = (left + ((mix64(right ^ keys[r]) * a) >> 64)) % a
            else:
                right = (right + ((mix64(left ^ keys[r]) * b) >> 64)) % b
        x = left * b + right
        if x < n:
            return x


def permute(key: int, n: int, i: int) -> int:
    """Returns the place of index `i` among `n`."""
    if n <= 1:
        return i
    return fisher_yates(key, n)[i] if n <= SMALL else feistel(key, n, i)


def global_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """Sequence at each of `n` positions, by one permutation of all."""
    key = derive(seed, 1, epoch, 2)
    return [permute(key, n, p) for p in range(n)]


def block_order(
    n: int, *, seed: int, epoch: int, seq_len: int, chunk_tokens: int, window_tokens: int, lanes: int
) -> list[int]:
    """Sequence at each of `n` positions.

    Chunks are permuted first, and then sequences inside windows of each lane.
    """
    if n == 0:
        return []
    epoch_key = derive(seed, 1, epoch)
    chunk = max(1, chunk_tokens // seq_len)
    chunks = -(-n // chunk)
    chunk_key = derive(epoch_key, 3)
    listed: list[int] = []
    for slot in range(chunks):
        first = permute(chunk_key, chunks, slot) * chunk
        listed.extend(range(first, min(first + chunk, n)))
    return in_lanes(listed, epoch_key, window_tokens // seq_len, lanes)


def in_lanes(listed: list[int], epoch_key: int, window_rows: int, lanes: int) -> list[int]:
    """Deals `listed` out to lanes, and permutes inside windows of each lane."""
    n = len(listed)
    lanes = min(lanes, n)
    share, extra = divmod(n, lanes)
    window = max(1, window_rows // lanes)
    order = []
    for p in range(n):
        j, lane = divmod(p, lanes)
        length = share + (lane < extra)
        start = lane * share + min(lane, extra)
        # The phase of a lane shortens its first window, so that lanes begin windows at different
        # steps.
        phase = window * lane // lanes
        w = (j + phase) // window
        begin, end = max(0, w * window - phase), min((w + 1) * window - phase, length)
        inside = permute(derive(epoch_key, 4, lane, w), end - begin, j - begin)
        order.append(listed[start + begin + inside])
    return order


def in_buckets(order: list[int], lengths: list[int], *, size: int, seed: int, epoch: int, lanes: int) -> list[int]:
    """The order with rows of similar length beside each other. `lengths` are those of all rows.

    A bucket is a run of positions of one lane. Its rows are sorted, cut into up to 16 groups, and
    the groups are permuted.
    """
    found = list(order)
    lanes = max(1, min(lanes, len(order)))
    run = max(1, size // lanes)
    for lane in range(lanes):
        positions = list(range(lane, len(order), lanes))
        for number, start in enumerate(range(0, len(positions), run)):
            bucket = positions[start : start + run]
            rows = sorted((order[p] for p in bucket), key=lambda row: lengths[row])
            size_of_group = -(-len(rows) // 16)
            groups = [rows[at : at + size_of_group] for at in range(0, len(rows), size_of_group)]
            key = derive(seed, 1, epoch, 5, number)
            arranged = [row for slot in range(len(groups)) for row in groups[permute(key, len(groups), slot)]]
            for position, row in zip(bucket, arranged, strict=True):
                found[position] = row
    return found
