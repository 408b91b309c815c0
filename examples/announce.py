"""Says what `make demo` will download, how long it takes, and what it leaves behind.

    announce.py [--quick]

It runs before anything is installed, and needs only Python itself.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    environment = ROOT / ".venv"
    group = "quick" if quick else "demo"
    stamp, wanted = environment / f".has-{group}", ROOT / "requirements" / f"{group}.txt"
    installed = stamp.exists() and stamp.read_text() == wanted.read_text()
    built = (environment / ".has-wheel").exists()
    print("make demo: what will happen")
    if installed:
        print("  download   nothing: the packages are in .venv")
    elif quick:
        print("  download   NumPy, pyarrow and maturin from PyPI (about 70 MB), into .venv")
    else:
        print("  download   torch, NumPy, pyarrow, tokenizers, matplotlib and maturin from PyPI, into .venv")
        print("             torch alone takes 3 to 5 GB with its CUDA libraries")
    if not built:
        print("             crates from crates.io (about 40 MB), unless cargo has them already")
        print(f"  compile    Forebay's wheel: about {'2' if quick else '5'} minutes on two cores, once")
    print(f"  run        {'under a minute' if quick else 'about 6 minutes on two cores'}")
    print(f"  disk       {'1' if quick else '10'} GB at most: .venv, out/demo, and compiled crates in ~/.cache/forebay")
    print("  afterwards `make clean` removes .venv and out")
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < (1 if quick else 10) and not (installed and built):
        print(f"  WARNING    only {free_gb:.1f} GB are free here")
    if not quick:
        print("`make demo ARGS=--quick` shows the idea without torch, in about two minutes.")
    print(flush=True)


if __name__ == "__main__":
    main()
