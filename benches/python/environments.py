"""Makes the environments of the peers. Each is below `out/peers`, on top of an environment with
torch.

A package is taken from the environment below if that has a version that fits. So torch is not
installed twice. The first use makes an environment, which is then kept. A change of its
requirements makes it anew.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "peers"
LIMIT_S = 900

#: Packages to install. An environment without an entry is the environment that runs the benchmark.
REQUIREMENTS = {
    "dataloader-rs": ["dataloader-rs"],
    "datasets": ["datasets>=3"],
    "grain": ["grain"],
    "lance": ["pylance"],
    "litdata": ["litdata"],
    "megatron": ["megatron-core"],
    "spdl": ["spdl"],
    "streaming": ["mosaicml-streaming"],
    "torchtitan": ["torchtitan>=0.3"],
    "trl": ["trl>=1", "datasets>=3"],
}
#: Least Python version of the peers that need a newer Python than forebay does.
PYTHON = {"dataloader-rs": (3, 13)}
#: Newest Python 3 version to look for. torch has wheels for it.
NEWEST_MINOR = 14
#: Prints the packages that an interpreter sees. If a package is there twice, the first one is
#: imported.
LOOK = """
import importlib.metadata, json, sys
packages = {}
for found in importlib.metadata.distributions():
    packages.setdefault(found.name.lower().replace("_", "-"), found.version)
packages.pop("forebay", None)
paths = [path for path in sys.path if path.endswith("site-packages")]
print(json.dumps({"packages": [f"{name}=={version}" for name, version in packages.items()], "paths": paths}))
"""


class Unavailable(Exception):
    """Raised if an environment cannot be made. The text gives the reason."""


def run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        command, cwd=ROOT, input=stdin, stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Unavailable(" ".join(lines[:4])[:300] or f"`{command[0]}` ended with status {done.returncode}")
    return done.stdout.strip()


def find_uv() -> str:
    for found in (shutil.which("uv"), ROOT / ".venv-uv" / "bin" / "uv"):
        if found and Path(found).exists():
            return str(found)
    raise Unavailable("`uv` is missing: `pip install uv`")


def below(least: tuple[int, int], tell: Callable[[str], None]) -> Path:
    """The interpreter to build on: this one, the clone's free-threaded one, or the first that is
    new enough.
    """
    if sys.version_info >= least:
        return Path(sys.executable)
    script = str(ROOT / "scripts" / "setup.sh")
    # The environment of free-threaded CPython has torch. The tests use it as well.
    for kind, group in (("ft", "ft"), *((f"3{minor}", "bench") for minor in range(least[1], NEWEST_MINOR + 1))):
        if run(script, f"python-{kind}"):
            folder = f".venv-{kind}"
            if not (ROOT / folder / f".has-{group}").exists():
                tell(f"making {folder}, with a torch of its own: some GB to download, unless they are cached")
            run(script, "venv", folder, group)
            return ROOT / folder / "bin" / "python"
    raise Unavailable(
        f"needs Python >= {least[0]}.{least[1]}: put python{least[0]}.{least[1]} or python3.14t on the PATH, or make"
        " .venv with one (FOREBAY_PYTHON)"
    )


def name_and_version(line: str) -> tuple[str, str]:
    name, _, version = line.partition("==")
    return name.strip().lower(), version.partition("+")[0].strip()


def prepare(name: str, tell: Callable[[str], None]) -> Path:
    """Returns the interpreter of an environment, and makes the environment if it is missing.
    Reports that to `tell`.
    """
    if name not in REQUIREMENTS:
        return Path(sys.executable)
    folder, wanted = FOLDER / name, REQUIREMENTS[name]
    python, stamp = folder / "bin" / "python", folder / ".has"
    try:
        uv = find_uv()
        base = below(PYTHON.get(name, (3, 11)), tell)
        found = json.loads(run(str(base), "-c", LOOK))
        has = dict(name_and_version(line) for line in found["packages"])
        made_of = json.dumps([wanted, str(base), hashlib.sha256(json.dumps(has, sort_keys=True).encode()).hexdigest()])
        if python.exists() and stamp.exists() and stamp.read_text() == made_of:
            return python
        tell(f"installing {' '.join(wanted)}")
        resolved = resolve(uv, base, wanted, has)
        missing = [line for line in resolved if has.get(name_and_version(line)[0]) != name_and_version(line)[1]]
        shutil.rmtree(folder, ignore_errors=True)
        run(uv, "venv", "--quiet", "--python", str(base), str(folder))
        own = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (own / "below.pth").write_text("".join(f"{path}\n" for path in found["paths"]))
        if missing:
            run(uv, "pip", "install", "--quiet", "--python", str(python), "--no-deps", *missing)
        stamp.write_text(made_of)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"installing took more than {LIMIT_S} s") from None
    return python


def resolve(uv: str, base: Path, wanted: list[str], has: dict[str, str]) -> list[str]:
    """Chooses versions of all wanted packages. Prefers the versions that are installed already."""
    constraints = FOLDER / f".constraints-{os.getpid()}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    first: Unavailable | None = None
    try:
        for kept in (has, {"torch": has["torch"]} if "torch" in has else {}, {}):
            constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
            command = ["--python", str(base), "--no-header", "--no-annotate", "--quiet", "-c", str(constraints), "-"]
            try:
                lines = run(uv, "pip", "compile", *command, stdin="\n".join(wanted)).splitlines()
            except Unavailable as error:
                first = first or error
                continue
            return [line.strip() for line in lines if "==" in line and not line.startswith(("#", " "))]
    finally:
        constraints.unlink(missing_ok=True)
    assert first is not None
    raise first
