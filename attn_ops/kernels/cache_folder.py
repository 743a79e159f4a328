"""The folder in which processes of a user share what was made on this machine: compiled kernels and measured tiles."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folders() -> list[Path]:
    """Where to look, best first: SPARSEATTN_CACHE_DIR, or the user's cache folder and one for temporary files."""
    if given := os.environ.get("SPARSEATTN_CACHE_DIR"):
        return [Path(given)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    temporary = Path(tempfile.gettempdir()) / f"sparseattn_{os.getuid()}"
    # What another user may have put in a shared folder is not loaded.
    trusted = not temporary.exists() or temporary.stat().st_uid == os.getuid()
    return [Path(cache) / "sparseattn", *([temporary] if trusted else [])]


def writable(folders: list[Path]) -> Path:
    """The first of the folders that can be written to, made if it is not there.

    Raises:
        OSError: if there is none.
    """
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise OSError(f"no cache folder can be written to: {', '.join(map(str, folders))}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time. Where folders cannot be locked there may be several."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
