"""The command ``forebay``, also as ``python -m forebay``."""

from __future__ import annotations

import sys

from forebay import _core


def main() -> int:
    """Runs the command line; returns its exit status."""
    return _core.run_command(["forebay", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
