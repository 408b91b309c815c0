"""Writes the results as one page with plots, for readers who do not know the project.

The page has no script and loads nothing.
"""

import html
import math
from dataclasses import dataclass
from statistics import median

from contestants import GROUPS, Contestant
from corpus import CODECS
from report import (
    HEADS,
    METRICS,
    Against,
    Group,
    Line,
    Record,
    facts,
    groups,
    least,
    named,
    number,
    summary,
    times,
    turns,
)

STYLE = """
:root { color-scheme: light dark; --text: #1c2733; --soft: #5d6b7a; --line: #dfe4ea; --back: #fff; --card: #f5f7f9;
  --ours: #1769aa; --peer: #9aa7b5; --limit: #c2571a; --warn: #9a3412; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e9ef; --soft: #9aa7b5; --line: #2f3944; --back: #14191f;
  --card: #1c232b; --ours: #58a6e8; --peer: #6b7988; --limit: #ec8c4c; --warn: #fdba74; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 78rem; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h1 { margin-bottom: .3rem; } h2 { margin-top: 3rem; border-top: 1px solid var(--line);
  padding-top: 1.5rem; }
p, ul { max-width: 60rem; } .soft, .facts { color: var(--soft); } .facts { padding-left: 1.2rem; font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem;
  margin: 1.2rem 0; }
.card { background: var(--card); border-radius: 8px; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.35rem; line-height: 1.2; }
.card small { color: var(--soft); display: block; line-height: 1.4; }
.card.lost { border-left: 4px solid var(--limit); }
.warn { border-left: 4px solid var(--warn); background: var(--card); padding: .6rem 1rem; max-width: 58rem; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .8em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: 2rem 2.5rem;
  margin-top: 1.2rem; align-items: start; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
figcaption small { font-weight: 400; color: var(--soft); display: block; }
svg { width: 100%; min-width: 34rem; height: auto; display: block; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } svg .value { paint-order: stroke; stroke: var(--back); stroke-width: 5px; }
.reference { opacity: .5; } svg text.limit { fill: var(--limit); } svg .mine { font-weight: 600; }
.ours { fill: var(--ours); } .peer { fill: var(--peer); } .limit { fill: var(--limit); }
line.grid { stroke: var(--line); } line.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 5 3; }
line.whisker { stroke: var(--text); stroke-width: 1.2; } line.ours { stroke: var(--ours); stroke-width: 2; }
line.peer { stroke: var(--peer); stroke-width: 2; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
.numbers td { white-space: nowrap; } .numbers td.ahead, .numbers td.failed { white-space: normal; }
.numbers th:last-child { min-width: 9rem; } td.failed div { max-width: 50rem; }
th { color: var(--soft); font-weight: 600; } summary { cursor: pointer; color: var(--soft); margin-top: 1rem; }
code, pre { background: var(--card); border-radius: 4px; padding: .1em .3em; } pre { padding: .7rem 1rem;
  max-width: 58rem; overflow-x: auto; }
"""

INTRODUCTION = """
<p>Training a language model means reading billions of tokens: integers, stored in files, which a <em>loader</em> picks
in random order, widens to 64 bits and hands to the trainer as batches of <code>B</code> rows of <code>S</code> tokens.
This is little work per token, so a good loader takes little of the machine. This page compares <b>forebay</b> with
other loaders, and both with the <b>limit</b>: a bare loop on the same machine. The loop does only the work that no
loader can leave out. It gathers and widens rows, and decompresses compressed files.</p>
<p><b>How it was done.</b> Every loader delivers shuffled <code>input_ids</code> and <code>labels</code>, each with
memory of its own, to a consumer that does nothing else. Before a loader is timed, its first batches are looked up in
the corpus. Every row must occur there, in random order, and none twice. Loaders shuffle over different distances. From
Parquet, forebay shuffles rows within windows of 16 Mi tokens, and the script over pyarrow within a row group. The
table at the end shows the use of each loader. Each run is a fresh process. The runs take turns in random order, and
{turns}. All files are in memory already, so disks play no part.</p>
<p><b>How to read it.</b> <span class="key ours-key"></span>forebay<span class="key ours-key reference"></span>forebay
without torch, for reference and not compared<span class="key peer-key"></span>other loaders<span class="key limit-key">
</span>limit of the machine.<br>{names}
Thin lines reach from the slowest to the fastest turn. A longer bar is better, and so is a dot further left. Dots have
a logarithmic scale: each step of the grid is ten times as much. Point at a bar or dot for its numbers.</p>
"""

NAMES_NOTE = (
    "The number after a name, as in <b>· 2</b>, counts the helper threads or processes beside the trainer's own"
    " thread. A loader without a number works in the trainer's thread alone."
)
PALE = " The pale marks show NumPy arrays that are handed over without torch. They are a reference, not compared."
BY_HAND = (
    " <b>By hand</b> is our own script over pyarrow. It represents the script that a user would write, and is not a"
    " published loader. Up to 512 MiB of forebay's memory are decoded blocks that it keeps, by its default"
    " <code>memory_budget</code>."
)

GROUP_NOTES = {
    "uint16": "The corpus as 16-bit integers. forebay reads Arrow files of documents. Peers read a flat file, or a"
    " format of their own that was written before: the fastest that they have.",
    "int32": "The same tokens as 32-bit integers, the usual type of tokenizers' output.",
    "zstd": "Documents in Parquet, compressed with zstd: the limit is decompression alone.",
    "snappy": "Documents in Parquet, compressed with snappy: the limit is decompression alone.",
}


@dataclass
class Entry:
    label: str
    kind: str
    line: Line
    ours: bool


def kind_of(one: Contestant) -> str:
    return ("ours" if one.ours else "peer") + " reference" * one.reference


def entries(group: Group, field: str, more: bool) -> list[Entry]:
    """Returns the contestants that have this number, the best first."""
    found = [
        Entry(named(one), kind_of(one), line, one.ours)
        for one, line in group.lines
        if line.failed is None and any(field in run for run in line.runs)
    ]
    return sorted(found, key=lambda entry: values(entry.line, field)[1], reverse=more)


def values(line: Line, field: str) -> tuple[float, float, float]:
    """Returns the least, the median and the greatest value."""
    numbers = [run[field] for run in line.runs if field in run]
    return min(numbers), median(numbers), max(numbers)


WIDTH, NAMES, STEP, TOP = 640, 282, 22, 30


def figure(title: str, note: str, rows: int, body: str, more_top: int = 0) -> str:
    height = TOP + more_top + rows * STEP + 8
    return (
        f"<figure><figcaption>{title}<small>{note}</small></figcaption>"
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">'
        f"{body}</svg></div></figure>"
    )


def name(entry: Entry, y: float) -> str:
    kind = ' class="mine"' if entry.ours else ""
    return f'<text{kind} x="{NAMES - 8}" y="{y + 12}" text-anchor="end">{html.escape(entry.label)}</text>'


def speeds(group: Group) -> str:
    """Plots the speeds as bars, and the limits as lines."""
    found = entries(group, "tokens_per_s", True)
    limits = [(threads, line) for threads in (1, 2) if (line := group.limit(threads)) is not None and line.runs]
    limits = [(threads, line) for threads, line in limits if line.failed is None]
    if not found:
        return ""
    top = max([values(entry.line, "tokens_per_s")[2] for entry in found] + [line["tokens_per_s"] for _, line in limits])
    room = WIDTH - NAMES - 62

    def x(value: float) -> float:
        return NAMES + room * value / top

    parts = []
    begin = TOP + 14 * (len(limits) - 1)
    end = begin + STEP * len(found) + 4
    # The greatest limit is drawn on top, so that no line crosses the text of another.
    limits.sort(key=lambda pair: -pair[1]["tokens_per_s"])
    for place, (threads, line) in enumerate(limits):
        at = x(line["tokens_per_s"])
        shown = number(line["tokens_per_s"] / 1e6)
        y = 12 + 15 * place
        plural = "s" if threads > 1 else ""
        parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 9}" y2="{end}"/>')
        side = ("end", -4) if at > NAMES + 150 else ("start", 4)
        parts.append(
            f'<text class="limit" x="{at + side[1]:.1f}" y="{y}" text-anchor="{side[0]}">'
            f"limit, {threads} thread{plural}: {shown}</text>"
        )
    for row, entry in enumerate(found):
        y = begin + row * STEP
        low, middle, high = values(entry.line, "tokens_per_s")
        told = f"{entry.label}: {number(middle / 1e6)} Mtok/s ({number(low / 1e6)} to {number(high / 1e6)})"
        parts.append(
            f"<g><title>{html.escape(told)}</title>{name(entry, y)}"
            f'<rect class="{entry.kind}" x="{NAMES}" y="{y}" width="{max(x(middle) - NAMES, 1):.1f}" height="16"/>'
        )
        if len(entry.line.runs) > 1:
            parts.append(f'<line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y + 8}" y2="{y + 8}"/>')
        parts.append(f'<text class="soft value" x="{x(high) + 6:.1f}" y="{y + 12}">{number(middle / 1e6)}</text></g>')
    return figure("Throughput, million tokens per second", "longer is better", len(found), "".join(parts), begin - TOP)


def dots(group: Group, title: str, note: str, fields: list[tuple[str, str]], unit: str) -> str:
    """Plots dots on a logarithmic scale, from the best to the worst.

    Several numbers of a loader share a line.
    """
    first = fields[len(fields) // 2][0]
    found = entries(group, first, False)
    if not found:
        return ""
    floor = 0.01
    numbers = [
        max(values(entry.line, field)[1], floor)
        for entry in found
        for field, _ in fields
        if any(field in run for run in entry.line.runs)
    ]
    low, high = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)) + 1e-9)
    high = max(high, low + 1)
    room = WIDTH - NAMES - 50

    def x(value: float) -> float:
        return NAMES + 8 + room * (math.log10(max(value, floor)) - low) / (high - low)

    end = TOP + STEP * len(found)
    parts = [f'<text class="soft" x="{NAMES - 8}" y="{TOP - 14}" text-anchor="end">log scale</text>']
    for power in range(low, high + 1):
        value = 10.0**power
        shown = f"{value:g}" if value < 1e4 else f"{value / 1e3:,.0f}k" if value < 1e6 else f"{value / 1e6:g}M"
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP - 8}" y2="{end}"/>')
        parts.append(f'<text class="soft" x="{x(value):.1f}" y="{TOP - 14}" text-anchor="middle">{shown}</text>')
    for row, entry in enumerate(found):
        y = TOP + row * STEP
        middles = [(values(entry.line, f)[1], f, text) for f, text in fields if any(f in r for r in entry.line.runs)]
        told = ", ".join(f"{text} {number(value)} {unit}".strip() for value, _, text in middles)
        parts.append(f"<g><title>{html.escape(f'{entry.label}: {told}')}</title>{name(entry, y)}")
        if len(middles) > 1:
            places = [x(value) for value, _, _ in middles]
            parts.append(
                f'<line class="{entry.kind}" x1="{min(places):.1f}" x2="{max(places):.1f}" y1="{y + 8}" y2="{y + 8}"/>'
            )
        for place, (value, field, _) in enumerate(middles):
            lows, _, highs = values(entry.line, field)
            if len(middles) == 1 and len(entry.line.runs) > 1:
                parts.append(
                    f'<line class="whisker" x1="{x(lows):.1f}" x2="{x(highs):.1f}" y1="{y + 8}" y2="{y + 8}"/>'
                )
            if place == 0:
                parts.append(f'<circle class="{entry.kind}" cx="{x(value):.1f}" cy="{y + 8}" r="5"/>')
            elif place == 1:
                parts.append(f'<rect class="{entry.kind}" x="{x(value) - 4:.1f}" y="{y + 4}" width="8" height="8"/>')
            else:
                parts.append(f'<rect class="{entry.kind}" x="{x(value) - 1.5:.1f}" y="{y}" width="3" height="16"/>')
        last = max(x(value) for value, _, _ in middles)
        if len(middles) == 1:
            last = max(last, x(values(entry.line, middles[0][1])[2]))
            parts.append(f'<text class="soft value" x="{last + 9:.1f}" y="{y + 12}">{number(middles[0][0])}</text>')
        parts.append("</g>")
    return figure(title, note, len(found), "".join(parts))


def totals(group: Group, title: str, note: str, field: str) -> str:
    """Plots amounts as bars from zero, from the least to the greatest."""
    found = entries(group, field, False)
    if not found:
        return ""
    top = max(values(entry.line, field)[2] for entry in found)
    parts = []
    for row, entry in enumerate(found):
        y = TOP + row * STEP
        middle = values(entry.line, field)[1]
        width = max((WIDTH - NAMES - 62) * middle / top, 1)
        parts.append(
            f"<g><title>{html.escape(f'{entry.label}: {number(middle)} MB')}</title>{name(entry, y)}"
            f'<rect class="{entry.kind}" x="{NAMES}" y="{y}" width="{width:.1f}" height="16"/>'
            f'<text class="soft value" x="{NAMES + width + 6:.1f}" y="{y + 12}">{number(middle)}</text></g>'
        )
    return figure(title, note, len(found), "".join(parts))


def plots(group: Group) -> str:
    shown = [
        speeds(group),
        dots(group, "CPU seconds per billion tokens", "of everything it runs", [("cpu_s_per_gtok", "")], "CPU s"),
        totals(
            group, "Memory, MB, in total", "of all processes with their imports, mapped files not counted", "memory_mb"
        ),
        dots(
            group, "Waiting for a batch, µs", "half of the batches came within ●, 99 % within ■, 99.9 % within ❙",
            [("p50_us", "p50"), ("p99_us", "p99"), ("p999_us", "p99.9")], "µs",
        ),
        dots(group, "First batch, ms", "from creating the loader", [("first_batch_ms", "")], "ms"),
        dots(
            group, "Resuming, ms",
            "from no loader to its first batch, ● at 1 % of an epoch, ■ at 99 %; only those that have a state",
            [("resume_1_ms", "at 1 %"), ("resume_99_ms", "at 99 %")], "ms",
        ),
    ]  # fmt: skip
    return '<div class="plots">' + "".join(shown) + "</div>"


def cell(text: str) -> str:
    """Converts Markdown's bold and code to HTML."""
    for mark, tag in (("**", "b"), ("`", "code")):
        parts = (text if tag == "code" else html.escape(text)).split(mark)
        text = "".join(f"<{tag}>{part}</{tag}>" if index % 2 else part for index, part in enumerate(parts))
    return text


def rival(one: Contestant) -> str:
    return "the fastest other loader" if one.offered else "our own script over pyarrow"


def verdict(group: Group) -> str:
    """Describes in words the plots of a group."""
    fastest, equal = group.against("tokens_per_s", True), group.equal()
    if fastest is None:
        return ""
    (ours, mine), (peer, theirs) = fastest.mine, fastest.theirs
    limit = group.limit(1 + ours.helpers)
    of_limit = (
        f", which is {mine['tokens_per_s'] / limit['tokens_per_s']:.0%} of the limit with as many threads (two at most)"
        if limit is not None and limit.failed is None
        else ""
    )

    def speed(one: Contestant, line: Line) -> str:
        return f"{html.escape(named(one))}: {number(line['tokens_per_s'] / 1e6)} on {line['cores']:.2f} cores"

    def ratio(against: Against) -> str:
        return f"{'' if against.ratio >= 1 else 'only '}<b>{against.ratio:.2f} times</b>"

    text = (
        f"With torch tensors, forebay at its fastest ({html.escape(named(ours))}, on {mine['cores']:.2f} cores)"
        f" delivers {number(mine['tokens_per_s'] / 1e6)} million tokens per second{of_limit}, and {ratio(fastest)} what"
        f" {rival(peer)} does ({speed(peer, theirs)})."
    )
    if equal is not None and (equal.mine, equal.theirs) == (fastest.mine, fastest.theirs):
        text += " Both had as many threads."
    elif equal is not None:
        text += (
            f" With as many threads on both sides it is {ratio(equal)} ({speed(*equal.mine)}; {speed(*equal.theirs)})."
        )
    lost = "; ".join(
        f"{name} ({html.escape(one.shown(one.theirs))}; {html.escape(one.shown(one.mine))})"
        for name, one in group.lost()
    )
    more = BY_HAND * (group.name in CODECS) + PALE * any(one.reference for one, _ in group.lines)
    return (
        f"<p>{text} {f'<b>Others are ahead</b> in {lost}.' if lost else 'In no measure is another ahead.'}</p>"
        f'<p class="soft">{NAMES_NOTE}{more}</p>'
    )


def card(title: str, found: list[Against | None], better: str, worse: str) -> str:
    """Shows one measure over all tables.

    The rows come from the table that is least favourable to forebay.
    """
    worst = least(found)
    if worst is None:
        return ""
    heading = times(found, better, worse)
    if worst.field == "own_memory_mb":
        # Next to the time of the imports, a ratio would say too much.
        apart, worst = max(
            ((one.mine[1][one.field] - one.theirs[1][one.field], one) for one in found if one is not None),
            key=lambda pair: pair[0],
        )
        heading = f"{'up to' if apart > 0 else 'at least'} {number(abs(apart))} MB {'more' if apart > 0 else 'less'}"
    return (
        f'<div class="card{"" if worst.ratio >= 1 else " lost"}"><small>{title}</small><b>{heading}</b>'
        f"<small>{html.escape(worst.title)}<br>{html.escape(worst.shown(worst.mine))}"
        f"<br>{html.escape(worst.shown(worst.theirs))}</small></div>"
    )


def cards(found: list[Group]) -> str:
    """Shows all groups at a glance."""
    if not any(group.against("tokens_per_s", True) for group in found):
        return ""
    parts = [card("throughput, as many threads on both sides", [group.equal() for group in found], "faster", "slower")]
    words = {"CPU": ("less", "more")}
    titles = {
        "speed": "throughput, the fastest row of each side", "CPU": "CPU time per token",
        "p99": "99 % of batches within", "p99.9": "99.9 % of batches within",
    }  # fmt: skip
    for name, field, more in METRICS:
        several = [group.against(field, more) for group in found]
        parts.append(card(titles.get(name, name), several, *words.get(name, ("faster", "slower"))))
    return (
        f"<h3>At a glance: forebay's worst result in each measure, over {len(found)} table{'s' * (len(found) > 1)}</h3>"
        '<p class="soft">Each measure on its own takes the best row of each side, and the row may differ between'
        " measures; shown is the table that is least favourable to forebay. For Parquet the other is our own script"
        " over pyarrow, and forebay's memory is mostly decoded blocks that it keeps, up to 512 MiB by default.</p>"
        f'<div class="cards">{"".join(parts)}</div>'
    )


def who(found: list[Group]) -> str:
    """Lists all contestants, their kind, and whether they were verified."""
    rows: dict[tuple[str, ...], tuple[list[str], list[str], list[int]]] = {}
    for group in found:
        for one, line in group.lines:
            state = "" if line.failed is None else f"<b>failed</b>: {html.escape(line.failed)}"
            key = (html.escape(one.label), html.escape(line.version), html.escape(one.how), line.python, state)
            helpers, formats, checked = rows.setdefault(key, ([], [], []))
            helpers.append(str(one.helpers))
            formats.append(GROUPS[group.name])
            checked += [run["checked_rows"] for run in line.runs]

    def several(texts: list[str]) -> str:
        return "; ".join(dict.fromkeys(texts))

    heads = ("", "version", "helpers", "reads", "how it is used", "Python", "rows of each run found in the corpus")
    body = "".join(
        "<tr>"
        + "".join(f"<td>{text}</td>" for text in (
            label, version, several(sorted(helpers)), several(formats), how, python,
            state or f"all of the first {min(checked)} or more",
        ))
        + "</tr>"
        for (label, version, how, python, state), (helpers, formats, checked) in rows.items()
    )  # fmt: skip
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>{body}</table></div>'


def lost_of(found: list[Group]) -> str:
    rows = [
        (name, one.title, one.shown(one.theirs), one.shown(one.mine))
        for measure, _, _ in METRICS
        for group in found
        for name, one in group.lost()
        if name == measure
    ]
    if not rows:
        return "<p>Nowhere in these tables.</p>"
    heads = "".join(f"<th>{head}</th>" for head in ("in", "table", "the best other", "the best of forebay"))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="numbers"><tr>{heads}</tr>{body}</table></div>'


def row_of(row: list[str]) -> str:
    # The reason would widen its column, which holds numbers.
    if row[2].replace("*", "").startswith("failed"):
        told = f'<td class="failed" colspan="{len(row) - 2}"><div>{cell(row[2])}</div></td>'
        return "".join(f"<td>{cell(text)}</td>" for text in row[:2]) + told
    return "".join(f"<td>{cell(text)}</td>" for text in row[:-1]) + f'<td class="ahead">{cell(row[-1])}</td>'


def numbers_of(group: Group) -> str:
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    rows = "".join(f"<tr>{row_of(row)}</tr>" for row in group.rows())
    return (
        '<details><summary>All numbers</summary><div class="scroll"><table class="numbers">'
        f"<tr>{heads}</tr>{rows}</table></div></details>"
    )


def page(records: list[Record]) -> str:
    found = groups(records)
    told = facts(records)
    date = next(fact for fact in told if fact.startswith("Date"))
    keys = "".join(f".{kind}-key {{ background: var(--{kind}); }} " for kind in ("ours", "peer", "limit"))
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Forebay benchmark</title><style>{STYLE}{keys}</style>",
        "<h1>Loading tokens: forebay, other loaders, and the limit of the machine</h1>",
        f'<p class="soft">{cell(told[0])}; {cell(date)}; {turns(records)}</p>',
        *(f'<p class="warn">{cell(fact)}</p>' for fact in told if "**" in fact),
        "<p><b>In short.</b> " + "<br>".join(html.escape(line) for line in summary(records)) + "</p>",
        INTRODUCTION.replace("{turns}", turns(records)).replace("{names}", NAMES_NOTE),
    ]
    if found:
        parts.append(cards(found))
    parts += ["<h3>Where another loader is ahead of every row of forebay</h3>", lost_of(found)]
    for group in found:
        parts.append(
            f'<h2>{html.escape(group.title)}</h2><p class="soft">{GROUP_NOTES[group.name]}</p>{verdict(group)}'
            f"{plots(group)}{numbers_of(group)}"
        )
    parts += [
        "<h2>Who took part, and how</h2>", who(found),
        "<h2>Machine, versions, and doing it again</h2>",
        '<ul class="facts">' + "".join(f"<li>{cell(fact)}</li>" for fact in told) + "</ul>",
        f"<pre>git clone … &amp;&amp; cd forebay\n{html.escape(records[0]['command'])}</pre>",
        '<p class="soft">Needs Linux, make, cargo, a C compiler, and Python 3.11 or newer with venv; the first time the'
        " network as well, for crates and packages. Below the clone it leaves <code>out</code> (2 GB) and environments:"
        " about 5 GB for each Python with a torch of its own, shared with uv's cache where hard links are possible."
        " Outside it leaves <code>~/.cache/uv</code> (6 GB or more), <code>~/.cache/forebay</code> (2 GB, what was"
        " compiled) and <code>~/.cargo</code> (0.2 GB, sources of crates). <code>results.jsonl</code> beside this page"
        " has every single run, with machine and versions.</p>",
    ]  # fmt: skip
    return "\n".join(parts) + "</html>\n"
