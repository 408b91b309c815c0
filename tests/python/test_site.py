"""Checks all pages together: links, pages made from the code, messages, the site in a browser."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import support

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benches/*.md", "tests/*.md", ".github/**/*.md", "bindings/**/*.md")
    for path in ROOT.glob(pattern)
)
PAGE_NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as code hosts and Sphinx make them."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / path).resolve() if path else page
        lacks_anchor = anchor and file.is_file() and file.suffix == ".md" and anchor not in anchors(file.read_text())
        if not file.exists() or lacks_anchor:
            dead.append(target)
    return dead


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    assert dead_links(ROOT / name, (ROOT / name).read_text()) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Some `code`\n\n[a](#some-code) [b](#other) [c](no.md) [d](page.md#some-code) [e](https://x)\n")
    assert dead_links(page, page.read_text()) == ["#other", "no.md"]


def test_the_python_page_comes_from_the_code() -> None:
    expected = script("pages").python_page()
    assert (ROOT / "docs" / "python.md").read_text() == expected, "run `make generate`"


@pytest.mark.thread_unsafe(reason="it writes a program and starts it")
def test_the_page_of_options_comes_from_the_commands(tmp_path: Path) -> None:
    program = tmp_path / "forebay"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m forebay "$@"\n')
    program.chmod(0o755)
    expected = script("pages").cli_page(str(program))
    assert (ROOT / "docs" / "cli.md").read_text() == expected, "run `make generate`"


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    places = (
        "loader/src/**/*.rs",
        "remote/src/*.rs",
        "service/src/**/*.rs",
        "bindings/**/*.rs",
        "bindings/python/**/*.py",
    )
    files = [path for place in places for path in ROOT.glob(place)]
    code = re.sub(r"\\\n\s*", "", "\n".join(path.read_text() for path in files))
    # Places for values are the same in the code and on the page.
    code = re.sub(r"\{[^{}\n;]*\}", "…", code)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [text.strip() for text in re.findall(r"``(.+?)``", page)]
    assert len(messages) > 40
    missing = [text for text in messages if not all(part.strip() in code for part in text.split("…") if part.strip())]
    assert missing == []


def test_the_troubleshooting_page_names_every_exception() -> None:
    import forebay

    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    errors = {name for name in forebay.__all__ if name.endswith("Error")} - {"ForebayError"}
    assert {name for name in errors if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("name", ["ci.yml", "wheels.yml"])
def test_workflows_only_call_targets_of_the_makefile(name: str) -> None:
    text = (ROOT / ".github" / "workflows" / name).read_text()
    commands = re.findall(r"^ *-? *run: (.*)$", text, re.MULTILINE)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert commands and all(command.split()[0] == "make" for command in commands), commands
    assert {command.split()[1] for command in commands} <= targets


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="`make docs` installs the generator")
    out: Path = tmp_path_factory.mktemp("site")
    docs = script("docs")
    docs.stage(out / "source")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-c", str(ROOT / "docs" / "site")]
    done = subprocess.run([*command, str(out / "source"), str(out / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "site"


def test_the_site_has_every_page_and_loads_nothing_foreign(site: Path) -> None:
    names = set(script("docs").pages())
    assert names <= {path.stem for path in site.glob("*.html")}
    for page in site.glob("*.html"):
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"([^\"]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"(?:stylesheet|preload|icon)\"[^>]+href=\"([^\"]+)", text)
        assert [address for address in loaded if "://" in address or address.startswith("//")] == [], page.name


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_site_without_scrolling_sideways(site: Path, width: int, tmp_path: Path) -> None:
    # A frame has the width of a phone, which the window of a headless browser may not have.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe id=f src='file://{site}/settings.html' style='width:{width}px;height:900px;border:0'></iframe>"
        "<pre id=p>none</pre><script>f.onload = () => { const d = f.contentDocument.documentElement;"
        " p.textContent = `found ${d.scrollWidth} of ${d.clientWidth}, ${f.contentDocument.title}` }</script>"
    )
    shown = support.shown_by_a_browser(f"file://{probe}", tmp_path / "profile")
    found = re.search(r"found (\d+) of (\d+), ([^<]+)", shown)
    assert found is not None, shown[-2000:]
    assert int(found[1]) <= int(found[2]) <= width and "Settings" in found[3]
