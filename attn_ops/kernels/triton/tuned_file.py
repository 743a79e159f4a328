"""The file with the tiles measured on a GPU: one for each GPU, release of Triton and state of the kernels' source.

Its name tells all three, so none is ever stale. It is written beside its place and renamed into it, and whoever writes
adds to what is there: processes that tune at once lose nothing of each other. It has a digest: it is whole, or unused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from ..cache_folder import cache_folders, locked, writable
from .tile import Tile

Key = tuple[str, tuple[int, ...]]
"""A kernel, and the arguments of its table of tiles."""


class Measured(NamedTuple):
    """The tile that was fastest, its time, and that of the table's tile beside it, in ms."""

    tile: Tile
    ms: float
    table_ms: float


class Gpu(NamedTuple):
    """A GPU as far as it decides about tiles."""

    name: str
    arch: int

    @classmethod
    def at(cls, device: torch.device | int) -> Gpu:
        """That of a device."""
        major, minor = torch.cuda.get_device_capability(device)
        return cls(torch.cuda.get_device_name(device), 10 * major + minor)


class TunedFileError(Exception):
    """A file of tiles is not to be used; the message is the reason, as a clause."""


def find(gpu: Gpu) -> Path | None:
    """Where the file of this GPU is, the newest if there are several; None if there is none."""
    files = [file for folder in cache_folders() if os.path.exists(file := folder / _file_name(gpu))]
    return max(files, key=os.path.getmtime, default=None)


def read(file: Path, gpu: Gpu) -> dict[Key, Measured]:
    """What is in the file.

    Raises:
        TunedFileError: if it cannot be read, is damaged, or is that of something else.
    """
    try:
        content = json.loads(file.read_bytes())
        made_for, tiles = content["made_for"], content["tiles"]
        whole = content["digest"] == _digest(made_for, tiles)
    except OSError as error:
        raise TunedFileError(f"it cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise TunedFileError("it is damaged")
    if made_for != _made_for(gpu):
        raise TunedFileError(f"it is that of {made_for}, not of {_made_for(gpu)}")
    return dict(map(_entry, tiles))


def known(gpu: Gpu) -> dict[Key, Measured]:
    """What is in the GPU's file; nothing if there is none, or one that is not to be used."""
    try:
        return read(file, gpu) if (file := find(gpu)) else {}
    except TunedFileError:
        return {}


def add(gpu: Gpu, found: Mapping[Key, Measured]) -> Path:
    """Put what was found into the GPU's file, in place of what it says of the same keys. A damaged file is replaced.

    Raises:
        OSError: if no folder can be written to.
    """
    folder = writable(cache_folders())
    file = folder / _file_name(gpu)
    with locked(folder):
        merged = sorted({**known(gpu), **found}.items())
        tiles = [{"kernel": kernel, "key": key, **measured._asdict()} for (kernel, key), measured in merged]
        made_for = _made_for(gpu)
        _replace(file, _text(made_for, tiles))
    return file


def _entry(entry: dict[str, Any]) -> tuple[Key, Measured]:
    return (entry["kernel"], tuple(entry["key"])), Measured(Tile(*entry["tile"]), entry["ms"], entry["table_ms"])


def _made_for(gpu: Gpu) -> dict[str, str | int]:
    return {"gpu": gpu.name, "arch": gpu.arch, "triton": triton.__version__, "source": _source_hash()}


def _file_name(gpu: Gpu) -> str:
    name = re.sub(r"\W+", "_", gpu.name)
    return f"tiles-{name}-sm{gpu.arch}-triton_{triton.__version__}-{_source_hash()}.json"


def _text(made_for: dict[str, str | int], tiles: list[dict[str, Any]]) -> str:
    """JSON with a line for each tile."""
    head = json.dumps({"made_for": made_for, "digest": _digest(made_for, tiles)})
    lines = ",\n".join(map(json.dumps, tiles))
    return f'{head[:-1]}, "tiles": [\n{lines}\n]}}\n'


def _digest(made_for: dict[str, str | int], tiles: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([made_for, tiles]).encode()).hexdigest()


@functools.cache
def _source_hash() -> str:
    """A hash of everything in this folder: the kernels, and what launches them."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source.update(path.read_bytes())
    return source.hexdigest()[:16]


def _replace(file: Path, text: str) -> None:
    """Write the file, whole or not at all."""
    descriptor, part = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.", suffix=".part")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        os.unlink(part)
        raise
