"""Turns the records of a run into Markdown. Numbers are medians over the turns."""

import textwrap
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

from contestants import GROUPS, Contestant, contestants
from rows import Shape

Record = dict[str, Any]

#: Each entry has a name, a field, and whether more is better.
METRICS = (
    ("speed", "tokens_per_s", True),
    ("CPU", "cpu_s_per_gtok", False),
    ("memory", "own_memory_mb", False),
    ("first batch", "first_batch_ms", False),
    ("p50", "p50_us", False),
    ("p99", "p99_us", False),
    ("p99.9", "p999_us", False),
    ("resume at 1 %", "resume_1_ms", False),
    ("resume at 99 %", "resume_99_ms", False),
)
#: For each field, the divisor and the unit that results.
UNITS = {
    "tokens_per_s": (1e6, "Mtok/s"), "cpu_s_per_gtok": (1, "CPU s/Gtok"), "own_memory_mb": (1, "MB"),
    "first_batch_ms": (1, "ms"), "p50_us": (1, "µs"), "p99_us": (1, "µs"), "p999_us": (1, "µs"),
    "resume_1_ms": (1, "ms"), "resume_99_ms": (1, "ms"),
}  # fmt: skip
LIMITS = {
    "gather": "limit: gather and widen, no loader",
    "decompress": "limit: decompress 16-bit tokens, nothing else",
    "decode": "pyarrow's decoding of row groups, no batches",
}
HEADS = [
    "", "helpers", "Mtok/s (min to max)", "of limit", "of fastest peer", "CPU s/Gtok", "cores",
    "memory MB (with imports)", "first batch ms", "next() µs p50 / p99 / p99.9", "resume ms at 1 % / 99 %",
    "a peer is ahead in",
]  # fmt: skip


def number(value: float) -> str:
    """Formats a number with three significant digits."""
    for digits, above in ((0, 100), (1, 10), (2, 0.1)):
        if abs(value) >= above:
            return f"{value:.{digits}f}"
    return f"{value:.3f}"


def named(one: Contestant) -> str:
    return f"{one.label} · {one.helpers}" if one.helpers else one.label


class Line:
    """The results of several runs of one contestant or limit."""

    def __init__(self, records: list[Record]) -> None:
        self.name, self.group = records[0]["name"], records[0]["group"]
        self.threads = records[0].get("threads", 0)
        self.failed = next((record["failed"] for record in records if "failed" in record), None)
        self.runs = [record for record in records if "failed" not in record]

    @property
    def version(self) -> str:
        return next((run["version"] for run in self.runs if "version" in run), "")

    @property
    def python(self) -> str:
        return next((run["python"] for run in self.runs if "python" in run), "")

    @property
    def resume(self) -> str:
        """The times at 1 % and 99 % of an epoch. Empty for a contestant without a state."""
        failed = next((run["resume_failed"] for run in self.runs if "resume_failed" in run), None)
        shown = []
        for field in ("resume_1_ms", "resume_99_ms"):
            values = [run[field] for run in self.runs if field in run]
            missing = "too slow to get there" if failed is None else f"failed: {failed[:60]}"
            shown.append(number(median(values)) if values else missing)
        if failed is None and not any("resume_1_ms" in run for run in self.runs):
            return ""
        inexact = any(run.get("resume_exact") is False for run in self.runs)
        return " / ".join(shown) + (", another batch" if inexact else "")

    def __getitem__(self, field: str) -> float:
        return median(run[field] for run in self.runs if field in run)

    def has(self, field: str) -> bool:
        """A state that leads to another batch resumes nothing, however fast."""
        inexact = field.startswith("resume") and any(run.get("resume_exact") is False for run in self.runs)
        return not inexact and any(field in run for run in self.runs)

    def shown(self, field: str) -> str:
        scale, unit = UNITS[field]
        more = f" ({self['memory_mb']:.0f} with imports)" if field == "own_memory_mb" else ""
        return f"{number(self[field] / scale)} {unit}{more}"

    @property
    def speed(self) -> str:
        values = [run["tokens_per_s"] / 1e6 for run in self.runs]
        spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
        return number(median(values)) + spread


Pair = tuple[Contestant, Line]


@dataclass
class Against:
    """One of our rows and one of the others' rows in one table, compared by one measure."""

    title: str
    field: str
    mine: Pair
    theirs: Pair
    #: Above 1 if forebay is ahead.
    ratio: float

    def shown(self, pair: Pair) -> str:
        cores = f" on {pair[1]['cores']:.2f} cores" if self.field == "tokens_per_s" else ""
        return f"{named(pair[0])}: {pair[1].shown(self.field)}{cores}"

    @property
    def text(self) -> str:
        return f"{self.shown(self.mine)}; {self.shown(self.theirs)}"


@dataclass
class Group:
    """Contestants that read the same bytes, and their limits."""

    shape: Shape
    name: str
    limits: dict[tuple[str, int], Line]
    lines: list[Pair]

    @property
    def title(self) -> str:
        return f"{GROUPS[self.name]}, {self.shape}"

    def limit(self, threads: int) -> Line | None:
        kind = "gather" if self.name in ("uint16", "int32") else "decompress"
        return self.limits.get((kind, min(threads, 2)))

    def best(self, ours: bool, field: str, more: bool, helpers: int | None = None) -> Pair | None:
        found = [
            (one, line)
            for one, line in self.lines
            if one.ours == ours and not one.reference and line.failed is None and line.has(field)
            and helpers in (None, one.helpers)
        ]  # fmt: skip
        return (max if more else min)(found, key=lambda pair: pair[1][field], default=None)

    def against(self, field: str, more: bool, helpers: int | None = None) -> Against | None:
        """Compares our best row with the others' best row. Takes all rows, or only rows with that
        many helpers.
        """
        mine, theirs = self.best(True, field, more, helpers), self.best(False, field, more, helpers)
        if mine is None or theirs is None:
            return None
        values = mine[1][field], theirs[1][field]
        above, below = values if more else values[::-1]
        # A row that takes no memory at all is not infinitely better.
        return Against(self.title, field, mine, theirs, max(above, 0.01) / max(below, 0.01))

    def equal(self) -> Against | None:
        """Compares speeds with the same number of threads on both sides. Takes the number
        that is least favourable to forebay.
        """
        return least(
            [self.against("tokens_per_s", True, helpers) for helpers in {one.helpers for one, _ in self.lines}]
        )

    def behind(self, one: Contestant, line: Line) -> str:
        """The measures in which some peer beats this row of ours."""
        if not one.ours or one.reference:
            return ""
        found = []
        for name, field, more in METRICS:
            peer = self.best(False, field, more)
            if peer is None or not line.has(field):
                continue
            if peer[1][field] > line[field] if more else peer[1][field] < line[field]:
                found.append(name)
        return ", ".join(f"**{name}**" for name in found) or "nothing"

    def rows(self) -> list[list[str]]:
        rows = []
        for (kind, threads), line in sorted(self.limits.items(), key=lambda item: (-len(item[0][0]), item[0])):
            # No trainer's thread waits beside the threads of a limit.
            label = f"{LIMITS[kind]}, {threads} thread{'s' * (threads > 1)} in all"
            if line.failed is not None:
                rows.append([label, "", f"failed: {line.failed}", *[""] * (len(HEADS) - 3)])
            else:
                cost = [number(line["cpu_s_per_gtok"]), number(line["cores"])]
                rows.append([label, "", line.speed, "", "", *cost, *[""] * (len(HEADS) - 7)])
        fastest = self.best(False, "tokens_per_s", True)
        ranked = sorted(self.lines, key=lambda pair: (pair[1].failed is not None, not pair[0].ours, pair[0].reference))
        for one, line in ranked:
            label = f"**{one.label}**" if one.ours else one.label
            label += ", reference" if one.reference else ""
            if line.failed is not None:
                rows.append([label, str(one.helpers), f"**failed**: {line.failed}", *[""] * (len(HEADS) - 3)])
                continue
            limit = self.limit(1 + one.helpers)
            speed = line["tokens_per_s"]
            rows.append([
                label,
                str(one.helpers),
                line.speed,
                f"{speed / limit['tokens_per_s']:.2f}" if limit and limit.failed is None else "",
                f"{speed / fastest[1]['tokens_per_s']:.2f}" if fastest else "",
                number(line["cpu_s_per_gtok"]),
                f"{line['cores']:.2f}",
                f"{number(line['own_memory_mb'])} ({line['memory_mb']:.0f})",
                number(line["first_batch_ms"]),
                " / ".join(number(line[field]) for field in ("p50_us", "p99_us", "p999_us")),
                line.resume,
                self.behind(one, line),
            ])  # fmt: skip
        return rows

    def lost(self) -> list[tuple[str, Against]]:
        """Every measure in which the best peer beats our best row."""
        found = [(name, self.against(field, more)) for name, field, more in METRICS]
        return [(name, one) for name, one in found if one is not None and one.ratio < 1]


def groups(records: list[Record]) -> list[Group]:
    known = {one.name: one for one in contestants()}
    shapes = list(dict.fromkeys(Shape(record["batch_size"], record["seq_len"]) for record in sorted(
        (record for record in records[1:] if "seq_len" in record), key=lambda record: record["seq_len"]
    )))  # fmt: skip
    found = []
    for shape in shapes:
        for name in GROUPS:
            runs: dict[tuple[str, str, int], list[Record]] = {}
            for record in records[1:]:
                here = "seq_len" not in record or Shape(record["batch_size"], record["seq_len"]) == shape
                if record["group"] == name and here:
                    runs.setdefault((record["kind"], record["name"], record.get("threads", 0)), []).append(record)
            limits = {key[1:]: Line(some) for key, some in runs.items() if key[0] == "limit"}
            order = list(known)
            lines = [(known[key[1]], Line(some)) for key, some in runs.items() if key[0] == "loader"]
            lines.sort(key=lambda pair: order.index(pair[0].name))
            if lines:
                found.append(Group(shape, name, limits, lines))
    return found


def failures(records: list[Record]) -> list[str]:
    """Lists the contestants that are missing from the comparison, with reasons, once for all
    tables.
    """
    labels = {one.name: one.label for one in contestants()} | LIMITS
    reasons: dict[str, list[str]] = {}
    for record in records[1:]:
        if "failed" in record:
            reasons.setdefault(record["failed"], []).append(labels.get(record["name"], record["name"]))
    return [f"**Missing: {', '.join(dict.fromkeys(who))}**: {reason}" for reason, who in reasons.items()]


def turns(records: list[Record]) -> str:
    """Tells how many turns there were, and how the numbers were therefore formed."""
    done = max((record["repeat"] for record in records[1:]), default=0) + 1
    planned = records[0]["plan"].get("repeats", done)
    kind = {1: "one turn", 2: "the mean of two turns"}.get(done, f"the median of {done} turns")
    return f"numbers are {kind}" + (f" ({planned} were planned)" if planned > done else "")


def facts(records: list[Record]) -> list[str]:
    head = records[0]
    machine, plan = head["machine"], head["plan"]
    loaders = [record for record in records[1:] if "other_cores" in record]
    others = [record["other_cores"] for record in loaders]
    measured = sorted(
        {f"{run['version']} (Python {run['python']})" for run in loaders if "version" in run}, key=str.lower
    )
    found = [
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['kernel']}",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in head["versions"].items()),
        *([f"Measured: {', '.join(measured)}"] if measured else []),
        f"Date: {head['date']}; commit: {head['commit']}; command: `{head['command']}`",
        f"Every format holds {plan['tokens'] / 1e6:.0f} M tokens. The {turns(records)}. Each turn has a random order"
        f" (seed {head['seed']}) and a fresh process for everything: {plan['warm_up_s']} s of warm-up, then a window of"
        f" {plan['window_s']} s. The page cache is warm.",
    ]
    if others:
        found.append(
            f"Meanwhile other processes and other guests of the host took {median(others):.2f} cores in the median run"
            f" and {max(others):.2f} in the worst"
            + ("; **this machine was not quiet**" if median(others) > 0.1 else "")
        )
    decoded = [run["decoded_per_token"] for run in loaders if run.get("decoded_per_token")]
    if decoded:
        found.append(
            f"forebay's Parquet windows lie within the first epoch of {plan['copies']} copies of the corpus. They"
            f" decoded {median(decoded):.2f} tokens per token delivered ({min(decoded):.2f} to {max(decoded):.2f})."
        )
    copied = [record["copy_bytes_per_s"] for record in records[1:] if "copy_bytes_per_s" in record]
    if copied:
        found.append(f"Copying buffers larger than the caches: {median(copied) / 1e9:.1f} GB/s at the median")
    found += failures(records)
    if any(record["kind"] == "interrupted" for record in records[1:]):
        found.append("**This run was interrupted: the numbers cover the work until then**")
    if head["quick"]:
        found.append("**A --quick run: it shows that everything works; one short window is no measurement**")
    return found


HOW_TO_READ = [
    "- Every loader hands over shuffled `input_ids` and `labels`, int64, each in memory of its own. The consumer does"
    " nothing else. Before a loader was timed, its first batches were found in the corpus.",
    "- Loaders differ in how far they shuffle. forebay's Parquet shuffles only within windows, and pyarrow by hand only"
    " within row groups.",
    "- **helpers**: threads or processes beside the consumer's thread; a name shows them after its `·`. forebay's"
    " consumer computes batches as well while it would wait: see **cores**.",
    "- **of limit**: speed over the limit with as many threads, the consumer's included, and two at most.",
    "- **memory**: anonymous and shared memory of all processes, beyond the memory of the imports. forebay may keep"
    " decoded blocks up to its `memory_budget`, 512 MiB by default.",
    "- **first batch**: constructor and first batch, without the imports.",
    "- **a peer is ahead in**: the measures in which the best peer of the table beats this row.",
    "- *by hand*: our own script over pyarrow; no project offers it as a loader.",
    "- *reference*: NumPy arrays without torch. They are neither compared nor counted.",
]


def wrapped(text: str) -> str:
    """Wraps the paragraphs and lists of Markdown at 100 characters. Tables and headings keep their
    lines.
    """
    lines = []
    for line in text.split("\n"):
        if line.startswith(("|", "#", "<!--")):
            lines.append(line)
            continue
        indent = "  " if line.startswith("- ") else ""
        options = {"break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(line, 100, subsequent_indent=indent, **options) or [""]  # type: ignore[arg-type]
    return "\n".join(lines)


def markdown(records: list[Record], *more: str) -> str:
    """The main tables. The facts in `more` stand at their head."""
    found = groups(records)
    parts = ["# Benchmark results", "", *[f"- {fact}" for fact in [*facts(records), *more]], ""]
    parts += ["## How to read the tables", "", *HOW_TO_READ, ""]
    for group in found:
        parts += [f"## {group.title}", "", "| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
        parts += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in group.rows()]
        parts.append("")
    lost = [pair for group in found for pair in group.lost()]
    parts += ["## Measures in which a peer is ahead of every row of forebay", ""]
    parts += [
        f"- {one.title}, {name}: {one.shown(one.theirs)}; the best of forebay: {one.shown(one.mine)}"
        for name, one in lost
    ] or ["Nowhere in these tables."]
    return "\n".join(parts) + "\n"


def least(found: list[Against | None]) -> Against | None:
    """The comparison in which forebay does worst."""
    return min((one for one in found if one is not None), key=lambda one: one.ratio, default=None)


def times(found: list[Against | None], better: str, worse: str) -> str:
    """Takes the table in which forebay does worst, so that no table is picked because it flatters
    forebay.
    """
    ratios = [one.ratio for one in found if one is not None]
    ahead = sum(ratio >= 1 for ratio in ratios)
    if ahead == len(ratios):
        return f"{min(ratios):.2f} times {better} or more"
    return f"up to {1 / min(ratios):.2f} times {worse}: behind in {len(ratios) - ahead} of {len(ratios)}"


def summary(records: list[Record]) -> list[str]:
    """The lines that a terminal shows at the end."""
    found = groups(records)
    lines = []
    for title, several in (
        ("As many threads on both sides", [group.equal() for group in found]),
        ("Fastest row against fastest row", [group.against("tokens_per_s", True) for group in found]),
    ):
        worst = least(several)
        if worst is not None:
            lines.append(f"{title}: forebay {times(several, 'faster', 'slower')} ({worst.title}: {worst.text})")
    lost = Counter(name for group in found for name, _ in group.lost())
    ahead = ", ".join(f"{name} ({count} of {len(found)} tables)" for name, count in lost.items())
    lines.append(f"Others are ahead of every row of forebay in: {ahead or 'nothing'}")
    lines += [text.replace("**", "") for text in failures(records)] or ["Nothing failed."]
    by_hand = any(not one.offered for group in found for one, _ in group.lines)
    return [*lines, f"All {turns(records)}" + ("; for Parquet, the other is our own script over pyarrow" * by_hand)]


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *("| " + " | ".join(row) + " |" for row in rows)
    ]  # fmt: skip


def circumstances(head: Record) -> list[str]:
    busy = head["other_cores"]
    machine = head["machine"]
    return [
        f"- {machine['cpu']}, {machine['cores']} cores; {head['date']}; commit {head['commit']}; `{head['command']}`",
        f"- Meanwhile other processes took {busy:.2f} cores"
        + ("; **this machine was not quiet: the times are to be measured again**" if busy > 0.1 else ""),
    ]


def section(records: list[Record]) -> str:
    """The part of the results for a measurement of forebay alone."""
    parts = {"resume": resume_parts, "scale": scale_parts}[records[0]["kind"]](records)
    return "\n".join(parts) + "\n"


def resume_parts(records: list[Record]) -> list[str]:
    runs: dict[tuple[str, float], list[Record]] = {}
    for record in records[1:]:
        runs.setdefault((record["name"], record["share"]), []).append(record)
    shares = sorted({share for _, share in runs})

    def shown(values: list[float]) -> str:
        low, _, high = quantiles(values)
        return f"{number(median(values))} ({number(low)} to {number(high)})"

    rows, verdicts = [], []
    for name in sorted({name for name, _ in runs}):
        of = {share: [run["resume_ms"] for run in runs[name, share]] for share in shares}
        opening = [run["open_ms"] for share in shares for run in runs[name, share]]
        blocks = runs[name, shares[0]][0]["blocks"]
        rows.append([name, f"{blocks:,}", shown(opening), *(shown(of[share]) for share in shares)])
        middles = {share: median(values) for share, values in of.items()}
        first, last = min(middles, key=middles.__getitem__), max(middles, key=middles.__getitem__)
        spread = max(quantiles(values)[2] - quantiles(values)[0] for values in of.values())
        apart = middles[last] - middles[first]
        verdicts.append(
            f"- {name}: the medians differ by {number(apart)} ms, {'less' if apart <= spread else '**more**'} than the"
            f" middle half of the runs at one place ({number(spread)} ms)"
        )
    repeats = max(record["repeat"] for record in records[1:]) + 1
    heads = ["", "blocks", "opening ms", *(f"at {share:.0%}: ms" for share in shares)]
    return [
        "## Resuming at any place of the epoch", "",
        "The time runs from `load_state_dict` to the first batch, on a loader that was opened for it. Each cell is the"
        f" median of {repeats} runs, with the middle half of them. Places and formats took turns in random order. Every"
        " first batch was the right one.", "",
        *circumstances(records[0]), *verdicts, "", *table(heads, rows),
    ]  # fmt: skip


def scale_parts(records: list[Record]) -> list[str]:
    of: dict[str, list[Record]] = {}
    for record in records[1:]:
        of.setdefault(record["kind"], []).append(record)
    tables, memory, state = of["scale-table"][0], of["scale-memory"][0], of["scale-state"][0]
    plans = {record["name"]: record for record in of["scale-plan"]}
    rows = []
    for order in of["scale-order"]:
        name = order["name"]
        first = [record for record in of["scale-first"] if record["name"] == name]
        places, plan = [record["us"] for record in first], plans[name]
        rows.append([
            name, f"{number(order['new_us'])}", f"{number(order['ns_per_position'])}",
            f"{number(min(places))} to {number(max(places))}",
            f"{min(r['shards'] for r in first)} to {max(r['shards'] for r in first)}",
            f"{min(r['shards_in_100_steps'] for r in first)} to {max(r['shards_in_100_steps'] for r in first)}",
            f"{plan['distances_seconds'] + plan['decoding_seconds']:.2f}", f"{plan['amplification']:.2f}",
        ])  # fmt: skip
    order = of["scale-order"][0]
    heads = [
        "order", "new epoch µs", "ns per position", "first batch found in µs", "shards in it", "shards in 100 steps",
        "plan s", "decoded per token",
    ]  # fmt: skip

    def power(n: int) -> str:
        for bits in range(9, 64):
            for beside in (-1, 0, 1):
                if n == 2**bits + beside:
                    return f"2^{bits}" + ("", f" {'+' if beside > 0 else '-'} 1")[beside != 0]
        return f"{n:,}"

    drawn = [
        [
            power(record["n"]), number(record["ns"]), number(record["ns_once"]), f"{record['pairs_z']:+.1f}",
            "" if record["moved_z"] is None else f"{record['moved_z']:+.1f}",
        ]
        for record in of["permutation"]
    ]  # fmt: skip
    built = "" if tables["profile"] == "release" else f"; **a {tables['profile']} build: slower than what is shipped**"
    return [
        "## 15 T tokens in 10^6 shards on 4096 ranks, simulated", "",
        f"{tables['tokens']:,} tokens lie in {tables['shards']:,} shards of uneven length. Sequences have 4096 tokens,"
        " and each rank gets 4 per step. The loader's own order, partition and plan ran over a table of token counts."
        " ARCHITECTURE.md tells how each structure grows.", "",
        *circumstances(records[0]),
        f"- The table of shards takes {tables['bytes'] / 1e6:.1f} MB, and adding it up takes"
        f" {tables['seconds'] * 1e3:.1f} ms. The order of an epoch takes {order['bytes']} bytes, and a state at most"
        f" {state['most_json_bytes']} bytes as JSON. At the end, all of this and the plans took"
        f" {memory['anonymous_bytes'] / 1e6:.1f} MB{built}.", "",
        *table(heads, rows), "",
        "- **first batch**: the first batches of ranks 0 and 4095, at 0, 50 and 99.9 % of an epoch.",
        "- **decoded per token**: the plan for Parquet with blocks of 128 Ki tokens and 512 MiB of cache on each rank."
        " It simulates a rank's whole epoch.", "",
        "## The permutation: cost and uniformity", "",
        "- **kept**: the permutation is drawn once and applied often.",
        "- **once**: it is drawn anew for each index, as in windows.",
        "- **pairs**: the new places of two neighbours, over 10^5 keys, in 16 x 16 classes.",
        "- **moved**: the distances by which 2^18 places move under one key, in 64 classes.",
        "", "Pairs and moved are standard deviations of chi-squared from its mean. A value above 4 would show that the"
        " permutation is not random." + built.lstrip(";"), "",
        *table(["n", "kept ns", "once ns", "pairs", "moved"], drawn),
    ]  # fmt: skip


def quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return tuple(ordered[round((len(ordered) - 1) * share)] for share in (0.25, 0.5, 0.75))  # type: ignore[return-value]
