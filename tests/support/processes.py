"""What only another process can show."""

from __future__ import annotations

import os
import subprocess
import sys


def run(code: str, *arguments: object, **environment: str) -> str:
    """What Python prints for a program in a fresh process; its error fails the test."""
    done = attempt(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def attempt(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program that may fail."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
