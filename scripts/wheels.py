"""Builds the wheels, proves their tags, and tries each in an empty environment.

The last line totals the checks. If there is no interpreter to build a wheel, it counts as skipped.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETUP = str(ROOT / "scripts" / "setup.sh")
GLIBC = (2, 28)
#: Machine of the wheels, in the words of zig: x86_64 or aarch64.
MACHINE = platform.machine()
OUT = ROOT / "out" / "dist"


def asked(*command: str) -> str:
    return subprocess.run([SETUP, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def build(python: str) -> Path:
    """Builds a wheel. On Linux, only the final link step uses zig, with the libc of the tag.

    All earlier steps are shared with the ordinary build. A wheel for macOS needs no such step.
    """
    tools = ROOT / ".venv" / "bin"
    folder = OUT / Path(python).name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [tools / "maturin", "build", "--release", "--quiet", "--manifest-path", "bindings/Cargo.toml"]
    command += ["--interpreter", python, "--out", folder]
    if sys.platform == "darwin":
        subprocess.run(command, cwd=ROOT, check=True)
        (wheel,) = folder.glob("*.whl")
        return wheel
    linker = folder / "link.sh"
    linker.write_text(
        f"#!/bin/sh\nexport CARGO_ZIGBUILD_PYTHON_PATH={shlex.quote(str(tools / 'python'))}\n"
        f'exec {shlex.quote(str(tools / "maturin"))} zig cc -- -target {MACHINE}-linux-gnu.{GLIBC[0]}.{GLIBC[1]} "$@"\n'
    )
    linker.chmod(0o755)
    command += ["--compatibility", f"manylinux_{GLIBC[0]}_{GLIBC[1]}"]
    subprocess.run([*command, "--", "-C", f"linker={linker}", "-C", "linker-flavor=gcc"], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def newest_glibc(wheel: Path) -> tuple[int, ...]:
    """Finds the newest version of glibc that the wheel's library needs.

    The versions of its symbols are names in its string table.
    """
    with zipfile.ZipFile(wheel) as packed:
        libraries = [packed.read(name) for name in packed.namelist() if name.endswith(".so")]
    found = re.findall(rb"GLIBC_(\d+)\.(\d+)", b"".join(libraries))
    assert found, f"{wheel.name} holds no library that is linked with glibc"
    return max((int(major), int(minor)) for major, minor in found)


def prove_tag(wheel: Path) -> None:
    if sys.platform == "darwin":
        assert "-macosx_" in wheel.name, f"{wheel.name} is not tagged for macOS"
        return
    newest = newest_glibc(wheel)
    assert newest <= GLIBC, f"{wheel.name} needs glibc {'.'.join(map(str, newest))}"
    assert f"-manylinux_{GLIBC[0]}_{GLIBC[1]}_" in wheel.name, f"{wheel.name} is not tagged for glibc {GLIBC}"
    auditwheel = ROOT / ".venv" / "bin" / "auditwheel"
    done = subprocess.run([auditwheel, "show", wheel], capture_output=True, text=True, check=True)
    said = re.search(r'tag:\s*"manylinux_(\d+)_(\d+)_', " ".join(done.stdout.split()))
    assert said, f"auditwheel: {done.stdout}{done.stderr}"
    assert tuple(map(int, said.groups())) <= GLIBC, f"auditwheel: {done.stdout}"
    print(f"wheels: {wheel.name} needs glibc {'.'.join(map(str, newest))}, auditwheel agrees", flush=True)


def try_out(wheel: Path, python: str) -> None:
    """Tries a wheel away from the clone, with only the packages that the wheel requires."""
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder, "empty")
        subprocess.run([python, "-m", "venv", venv], check=True)
        asked("install", str(venv), str(wheel))
        shutil.copytree(ROOT / "tests" / "wheels", Path(folder, "wheels"))
        subprocess.run([venv / "bin" / "python", "-I", "wheels/smoke.py"], cwd=folder, check=True, timeout=120)


def main() -> int:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    asked("venv", ".venv", "build", "wheels")
    for python in (asked("python"), asked("python-ft")):
        if not python:
            print("wheels: SKIPPED: no python3.14t found, so no wheel for free-threaded CPython", flush=True)
            counts["failed" if os.environ.get("CI") == "true" else "skipped"] += 1
            continue
        start = time.monotonic()
        try:
            wheel = build(python)
            prove_tag(wheel)
            try_out(wheel, python)
        except (AssertionError, ValueError, subprocess.SubprocessError) as error:
            print(f"wheels: FAILED for {python}: {error}", flush=True)
            counts["failed"] += 1
        else:
            size, seconds = wheel.stat().st_size / 1e6, time.monotonic() - start
            print(f"wheels: {wheel.relative_to(ROOT)}, {size:.1f} MB, {seconds:.0f} s", flush=True)
            counts["passed"] += 1
    print(", ".join(f"{number} {word}" for word, number in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
