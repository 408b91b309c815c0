"""Builds the site from the Markdown pages of this repository. A warning is an error.

    docs.py [--linkcheck]

The pages stay plain Markdown, so that code hosts show them as well. This program copies them to
`out/docs/source`, moves their links to the copies, and adds the page that holds the navigation of
`docs/site/nav.toml`. Sphinx then writes `out/docs/site`, which needs no network and no server.
`--linkcheck` asks every foreign address instead, and needs a network.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "docs" / "site"
OUT = ROOT / "out" / "docs"
#: Pages outside of docs/, by their names in the site.
OUTSIDE = {
    "results": "benches/RESULTS.md",
    "benchmarks": "benches/README.md",
    "architecture": "ARCHITECTURE.md",
    "changelog": "CHANGELOG.md",
    "roadmap": "ROADMAP.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
    "tests": "tests/README.md",
    "examples": "examples/README.md",
    "other-datasets": "bindings/python/forebay/torch/any_dataset/README.md",
}
LINK = re.compile(r"(\]\()([^)\s]+)(\))|^(\[[^\]]+\]: )(\S+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, Path]:
    """Every page of the site, by its name."""
    own = {path.stem: path for path in sorted((ROOT / "docs").glob("*.md"))}
    return own | {name: ROOT / path for name, path in OUTSIDE.items() if (ROOT / path).exists()}


def sections(names: set[str]) -> list[tuple[str, list[str]]]:
    """The navigation: titles, and the pages below them. Every page is in one section."""
    found = tomllib.loads((SITE / "nav.toml").read_text())["section"]
    listed = {name for section in found for name in section["pages"]}
    missing = sorted(listed - names)
    if missing:
        sys.exit(f"docs: docs/site/nav.toml names pages that do not exist: {', '.join(missing)}")
    for section in found:
        if section["title"] == "Tasks":
            section["pages"] += sorted(name for name in names - listed - set(OUTSIDE) if name != "index")
    return [(section["title"], section["pages"]) for section in found]


def moved(text: str, page: Path, copies: dict[Path, str], folder: Path) -> str:
    """The text of `page` with links that lead to the copies. Links in code stay."""

    def link(match: re.Match[str]) -> str:
        before, target, after = (
            match.group(1) or match.group(4),
            match.group(2) or match.group(5),
            match.group(3) or "",
        )
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return match.group()
        file = (page.parent / path).resolve()
        if not file.exists():
            sys.exit(f"docs: {page.relative_to(ROOT)} links to `{target}`, which does not exist")
        if file in copies:
            return f"{before}{copies[file]}.md{'#' + anchor if anchor else ''}{after}"
        if file.is_dir():
            sys.exit(f"docs: {page.relative_to(ROOT)} links to the folder `{target}`: name a file")
        copy = folder / "files" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        return f"{before}{copy.relative_to(folder).as_posix()}{after}"

    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(link, text[at : fence.start()]), fence.group()]
        at = fence.end()
    return "".join([*parts, LINK.sub(link, text[at:])])


def stage(folder: Path) -> None:
    """Writes the copies of all pages, and the navigation, to `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = pages()
    copies = {path.resolve(): name for name, path in found.items()}
    for name, path in found.items():
        (folder / f"{name}.md").write_text(moved(path.read_text(), path, copies, folder))
    listed = sections(set(found))
    hidden = sorted(set(found) - {name for _, names in listed for name in names} - {"index"})
    trees = [f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n" + "\n".join(names) + "\n```" for title, names in listed]
    trees += ["```{toctree}\n:hidden:\n:caption: More\n\n" + "\n".join(hidden) + "\n```"] if hidden else []
    with open(folder / "index.md", "a") as index:
        index.write("\n" + "\n\n".join(trees) + "\n")


def main() -> int:
    builder = "linkcheck" if "--linkcheck" in sys.argv[1:] else "html"
    source, site = OUT / "source", OUT / ("site" if builder == "html" else builder)
    stage(source)
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-j", "auto", "-b", builder]
    command += ["-c", str(SITE), "-d", str(OUT / "doctrees"), str(source), str(site)]
    code = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}).returncode
    if code == 0 and builder == "html":
        print(f"docs: {len(list(site.glob('*.html')))} pages; open {site / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
