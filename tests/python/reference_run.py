"""The content of a run as plain lists: the specification of `order/`.

The code is simple on purpose. It lists every epoch, and walks every lane of a mixture place by
place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import gcd
from typing import NamedTuple

from reference_order import derive

HOLDOUT_KEY = 0x686F6C646F757400
PHASE_KEY = 0x706861736500
RAMP_STEPS = 64

Position = tuple[int, int]


class Skip(NamedTuple):
    epoch: int
    start: int
    end: int


class Stage(NamedTuple):
    start: int
    ramp: int
    weights: list[int]


class Draw(NamedTuple):
    source: int
    epoch: int
    position: int


def side(sequences: int, every: int | None, split: str) -> list[int]:
    """Sequences of one side of a corpus. One of each run of `every` sequences is held out."""
    if every is None:
        return list(range(sequences))
    held = {run * every + ((derive(HOLDOUT_KEY, run) * every) >> 64) for run in range(-(-sequences // every))}
    return [s for s in range(sequences) if (s in held) == (split == "holdout")]


def phased(stream: list[int], phase: str, *, seed: int, epoch: int, seq_len: int) -> list[int]:
    """The joined stream, from the place where the first row of an epoch begins.

    The stream goes on at its start after its end, so that it loses no token.
    """
    if phase == "fixed" or not stream:
        return stream
    start = ((derive(seed, PHASE_KEY, epoch) * seq_len) >> 64) % len(stream)
    return stream[start:] + stream[:start]


def balanced(costs: list[int], ranks: int) -> list[list[int]]:
    """The numbers of the rows that each rank gets of a full global batch.

    The most expensive row goes first. Each row goes to the rank with the least cost so far, of the
    ranks that have too few rows.
    """
    found: list[list[int]] = [[] for _ in range(ranks)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        open_ranks = [mine for mine in found if len(mine) < len(costs) // ranks]
        min(open_ranks, key=lambda mine: sum(costs[row] for row in mine)).append(row)
    return [sorted(mine) for mine in found]


def course(epochs: Iterable[int], positions: Callable[[int], int], skips: list[Skip]) -> list[Position]:
    """Epoch and position of every delivery of a pass over `epochs`, in order."""
    return [
        (epoch, position)
        for epoch in epochs
        for position in range(positions(epoch))
        if not any(skip.epoch == epoch and skip.start <= position < skip.end for skip in skips)
    ]


def steps(stages: list[Stage]) -> list[tuple[int, list[int]]]:
    """Stages with each ramp as separate stages.

    Of stages with the same start, the last one counts.
    """
    found: dict[int, list[int]] = {}
    for number, stage in enumerate(stages):
        end = stage.start
        if number and stage.ramp:
            before = stages[number - 1].weights
            for step in range(1, RAMP_STEPS):
                mixed = [
                    old * sum(stage.weights) * (RAMP_STEPS - step) + new * sum(before) * step
                    for old, new in zip(before, stage.weights, strict=True)
                ]
                found[stage.start + stage.ramp * (step - 1) // RAMP_STEPS] = mixed
            end = stage.start + stage.ramp - stage.ramp // RAMP_STEPS
        found[end] = stage.weights
    return [(start, [weight // gcd(*weights) for weight in weights]) for start, weights in sorted(found.items())]


def apportioned(weights: list[int], cycle: int) -> list[int]:
    """Weights scaled to the sum `cycle`.

    The largest remainders get the units that rounding leaves.
    """
    total = sum(weights)
    counts = [weight * cycle // total for weight in weights]
    largest = sorted(range(len(weights)), key=lambda s: (-(weights[s] * cycle % total), s))
    for source in largest[: cycle - sum(counts)]:
        counts[source] += 1
    return counts


def turns(weights: list[int], places: int) -> list[int]:
    """Number of turns of each source among the first `places`.

    One half of the sources is set against the other half, and so on inside each half.
    """
    if len(weights) == 1:
        return [places]
    half = len(weights) // 2
    part = places * sum(weights[:half]) // sum(weights) if sum(weights) else 0
    return turns(weights[:half], part) + turns(weights[half:], places - part)


def lane_draws(
    lane: int,
    lanes: int,
    shares: list[int],
    epochs: list[int | None],
    stages: list[Stage],
    drop: bool,
    most: int,
    exact_per: int | None,
) -> list[int]:
    """Sources of a lane's first `most` places, or of all its places if they are fewer."""
    schedule = steps(stages)
    if exact_per:
        # Weights change between two global batches.
        schedule = [(-(-start // exact_per) * exact_per, weights) for start, weights in schedule]
    limits = [None if count is None else count * share for count, share in zip(epochs, shares, strict=True)]
    counts = [0] * len(shares)
    drawn: list[int] = []
    step, weights, place_in_piece = -1, [0] * len(shares), 0
    while len(drawn) < most:
        changed = step < 0
        while step + 1 < len(schedule) and -(-schedule[step + 1][0] // lanes) <= len(drawn):
            step, changed = step + 1, True
        gone = [limit is not None and count >= limit for limit, count in zip(limits, counts, strict=True)]
        now = [0 if over else weight for weight, over in zip(schedule[step][1], gone, strict=True)]
        while sum(now) == 0 and drop and step + 1 < len(schedule):
            step, changed = step + 1, True
            now = [0 if over else weight for weight, over in zip(schedule[step][1], gone, strict=True)]
        if sum(now) == 0:
            break
        if exact_per:
            now = apportioned(now, exact_per)
        if changed or now != weights:
            weights, place_in_piece = now, 0
        phase = sum(weights) * lane // lanes + place_in_piece
        before, after = turns(weights, phase), turns(weights, phase + 1)
        source = next(s for s in range(len(shares)) if after[s] > before[s])
        drawn.append(source)
        counts[source] += 1
        place_in_piece += 1
        if not drop and limits[source] is not None and counts[source] >= limits[source]:  # type: ignore[operator]
            break
    return drawn


def mixture(
    lanes: int,
    sizes: list[int],
    epochs: list[int | None],
    stages: list[Stage],
    drop: bool,
    runs: int = 1,
    most: int = 10**9,
    exact_per: int | None = None,
) -> list[list[Draw]]:
    """The draws in each of `runs` epochs of the mixture, at most about `most` of each."""
    shares = [[size // lanes + (lane < size % lanes) for size in sizes] for lane in range(lanes)]
    sources = [
        lane_draws(lane, lanes, shares[lane], epochs, stages, drop, -(-most // lanes), exact_per)
        for lane in range(lanes)
    ]
    even = min(len(drawn) for drawn in sources)
    places = [(lane, place) for place in range(even) for lane in range(lanes)]
    # Places that only some lanes have come at the end. They do not exist if a lane has no end.
    longest = max(len(drawn) for drawn in sources)
    if longest >= -(-most // lanes):
        longest = even
    places += [(lane, place) for place in range(even, longest) for lane in range(lanes) if place < len(sources[lane])]
    found = []
    for run in range(runs):
        counts = [[run * drawn.count(source) for source in range(len(sizes))] for drawn in sources]
        draws = []
        for lane, place in places:
            source = sources[lane][place]
            epoch, at = divmod(counts[lane][source], shares[lane][source])
            counts[lane][source] += 1
            draws.append(Draw(source, epoch, at * lanes + lane))
        found.append(draws)
    return found
