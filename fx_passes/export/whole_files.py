"""whole_files: files that are put in place together, complete, or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...attn_ops.errors import ArgumentError


@contextlib.contextmanager
def whole_files(target: Path) -> Iterator[Path]:
    """A new folder to write in, beside `target`. Its files move to where `target` is once the block ends well.

    They keep their names and replace files that have them. Whatever happens, the folder is gone afterwards.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        for file in sorted(
            folder.iterdir(), key=lambda file: file.name == target.name
        ):  # the one asked for is the last
            file.replace(target.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def checked_target(verb: str, path: str | Path, suffix: str) -> Path:
    """The path to write to, absolute.

    Raises:
        ArgumentError: if it has not that suffix, or there is no such folder.
    """
    target = Path(path).absolute()
    if target.suffix != suffix:
        raise ArgumentError(verb, "path", f"end in {suffix}", repr(str(path)))
    if not target.parent.is_dir():
        raise ArgumentError(verb, "path", "be in a folder that exists", repr(str(path)), "Make the folder first.")
    return target
