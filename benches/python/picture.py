"""Draws the picture of README and RESULTS.md from the tables in RESULTS.md.

    picture.py

Writes `benches/picture.svg`, and the opening of RESULTS.md: the picture and three sentences. The
picture shows one table of uncompressed files and one of Parquet, with the best row of each loader.
A test compares both with the tables.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "RESULTS.md"
PICTURE = RESULTS.with_name("picture.svg")
FLAT, PARQUET = "Uncompressed, 2 bytes per token, B=8 S=2048", "Parquet, snappy, B=8 S=2048"
BEGIN, END = "<!-- opening -->\n", "<!-- opening: end -->\n"
#: Names of the benchmark, in words of a stranger.
NAMES = {
    "forebay, Arrow": "Forebay",
    "forebay, Parquet": "Forebay",
    "torch DataLoader, batched": "DataLoader, whole batches",
    "torch DataLoader, per row": "DataLoader, row by row",
    "torch DataLoader, per row, processes": "DataLoader, 2 processes",
    "torchdata.nodes, batched": "torchdata.nodes",
    "torchdata.nodes, batched, threads": "torchdata.nodes, 2 threads",
    "pyarrow row groups, by hand": "a script over pyarrow",
}

WIDTH, LEFT, STEP = 560, 212, 24
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1c2733; } .title { font-weight: 600; } .soft { fill: #5d6b7a; }
.ours { fill: #1769aa; } .peer { fill: #9aa7b5; } rect.back { fill: #ffffff; }
@media (prefers-color-scheme: dark) { text { fill: #e4e9ef; } .soft { fill: #9aa7b5; } .ours { fill: #58a6e8; }
  .peer { fill: #6b7988; } rect.back { fill: #14191f; } }
"""


@dataclass
class Row:
    name: str
    ours: bool
    mtok_per_s: float
    #: Memory of all processes, with the imports.
    memory_mb: float


def rows(text: str, title: str) -> list[Row]:
    """The fastest row of each loader in a table, the fastest first, without limits."""
    section = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    heads = [cell.strip() for cell in lines[0]]
    speed_at = next(index for index, head in enumerate(heads) if head.startswith("Mtok/s"))
    memory_at = next(index for index, head in enumerate(heads) if head.startswith("memory MB"))
    best: dict[str, Row] = {}
    for cells in lines[2:]:
        label = cells[0].strip()
        memory = re.search(r"\((\d+)\)", cells[memory_at])
        if memory is None or label.endswith("reference") or "failed" in cells[speed_at]:
            continue
        plain = label.replace("*", "")
        speed = float(cells[speed_at].split()[0])
        row = Row(NAMES.get(plain, plain), label.startswith("**"), speed, float(memory[1]))
        if row.name not in best or best[row.name].mtok_per_s < speed:
            best[row.name] = row
    return sorted(best.values(), key=lambda row: -row.mtok_per_s)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def panel(y: int, title: str, note: str, entries: list[tuple[str, bool, float]]) -> tuple[str, int]:
    """Bars below a title, from `y` on. Returns them and the place below them."""
    parts = [f'<text class="title" x="12" y="{y}">{html.escape(title)}</text>']
    parts.append(f'<text class="soft" x="{WIDTH - 12}" y="{y}" text-anchor="end">{note}</text>')
    top = max(value for _, _, value in entries)
    for index, (name, ours, value) in enumerate(entries):
        at = y + 12 + index * STEP
        width = max((WIDTH - LEFT - 70) * value / top, 1)
        weight = ' class="title"' if ours else ""
        parts.append(f'<text{weight} x="{LEFT - 10}" y="{at + 14}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(
            f'<rect class="{"ours" if ours else "peer"}" x="{LEFT}" y="{at + 1}" width="{width:.1f}" height="17"/>'
        )
        parts.append(f'<text x="{LEFT + width + 7:.1f}" y="{at + 14}">{shown(value)}</text>')
    return "\n".join(parts), y + 12 + len(entries) * STEP + 30


def picture(text: str) -> str:
    flat, parquet = rows(text, FLAT), rows(text, PARQUET)
    y, parts = 28, []
    for title, note, entries in (
        ("Uncompressed files", "million tokens/s", [(row.name, row.ours, row.mtok_per_s) for row in flat]),
        ("Parquet (snappy)", "million tokens/s", [(row.name, row.ours, row.mtok_per_s) for row in parquet]),
        ("Memory, uncompressed", "MB, in total", [(row.name, row.ours, row.memory_mb) for row in flat]),
        ("Memory, Parquet", "MB, in total", [(row.name, row.ours, row.memory_mb) for row in parquet]),
    ):
        drawn, y = panel(y, title, note, entries)
        parts.append(drawn)
    told = html.escape(sentences(text).replace("`", ""))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 14}" role="img">\n<title>{told}</title>\n'
        f'<style>{STYLE}</style>\n<rect class="back" width="100%" height="100%"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def sentences(text: str) -> str:
    """The results in three sentences, for readers who do not know the project."""
    flat, parquet = rows(text, FLAT), rows(text, PARQUET)
    ours, other = (next(row for row in flat if row.ours is mine) for mine in (True, False))
    torch = max(row.mtok_per_s for row in flat if row.name.startswith("DataLoader"))
    mine, script = (next(row for row in parquet if row.ours is which) for which in (True, False))
    cores = re.search(r"^- Machine: .*?(\d+) cores", text, re.MULTILINE)
    more = mine.memory_mb - script.memory_mb
    return (
        "Every loader hands shuffled batches of the same tokens to a program that does nothing else, on a machine"
        f" with {cores[1] if cores else 'few'} cores. From uncompressed files, Forebay delivers"
        f" {shown(ours.mtok_per_s)} million tokens per second, the next loader {shown(other.mtok_per_s)} million, and"
        f" torch's `DataLoader` {shown(torch)} million. From Parquet, Forebay is"
        f" {mine.mtok_per_s / script.mtok_per_s:.1f} times as fast as a script over pyarrow, and takes"
        f" {shown(abs(more))} MB {'more' if more > 0 else 'less'} memory."
    )


def opening(text: str) -> str:
    alt = "Bars: speed and memory of Forebay and of other loaders"
    return f"![{alt}](picture.svg)\n\n{sentences(text)}\n"


def with_opening(text: str) -> str:
    """The text of RESULTS.md with a new opening below its title."""
    from report import wrapped

    head, _, rest = text.partition("\n\n")
    if rest.startswith(BEGIN):
        rest = rest.partition(END)[2].lstrip("\n")
    return f"{head}\n\n{BEGIN}{wrapped(opening(text))}{END}\n{rest}"


def write() -> None:
    text = RESULTS.read_text()
    RESULTS.write_text(with_opening(text))
    PICTURE.write_text(picture(text))


if __name__ == "__main__":
    write()
