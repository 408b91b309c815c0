"""Servers that tests start, and kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from support import clean_environment

LIMIT_S = 60


class Server:
    """A process that runs ``forebay serve``. It is killed at the end of the `with` block.

    `environment` holds further variables.
    """

    def __init__(self, *arguments: str | Path, listen: str, **environment: str) -> None:
        self.address = listen
        self._environment = clean_environment(**environment)
        self._command = [sys.executable, "-m", "forebay", "serve", *map(str, arguments), "--listen", listen]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready at "):
            raise AssertionError(f"the server did not start: {line!r} {self.process.communicate()[1]}")
        # A port of 0 is chosen by the system.
        self.address = line.removeprefix("ready at ").split(" and ")[0].strip()

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def stop(self) -> int:
        """Ends the server in order, and returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self._end()

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def _end(self) -> int:
        status = self.process.wait(LIMIT_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.kill()
