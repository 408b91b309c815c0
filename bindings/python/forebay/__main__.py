"""The command ``forebay``, also as ``python -m forebay``."""

from __future__ import annotations

import signal
import sys

from forebay import _core


def main() -> int:
    """Runs the command line; returns its exit status."""
    # It runs outside of the interpreter, which would only see Ctrl-C at its end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _core.run_command(["forebay", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
