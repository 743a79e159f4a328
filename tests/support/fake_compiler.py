"""Compilers that do something else."""

from __future__ import annotations

from pathlib import Path

COPY = "for last; do :; done; cp {} $last"
"""A compiler that writes a copy of a file, whatever it compiles."""


def fake_compiler(folder: Path, body: str) -> str:
    """A C++ compiler that says its version and otherwise runs a shell script; CXX names it."""
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1.0; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)
