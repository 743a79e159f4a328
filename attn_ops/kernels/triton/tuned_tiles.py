"""Tiles by measurement: a table of tiles, and in its place what `sparseattn tune` found on the GPU that launches.

A run never measures. The file is read at the first launch of a process on a GPU, and what it does not have is as the
table says. No key has a length: a tile is the same for short and long sequences, and so is the compiled kernel.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from .tile import Side, Tile, candidates
from .tuned_file import Gpu, Key, TunedFileError, find, read

SWITCH = "SPARSEATTN_TUNED_TILES"
_SUFFIX = "_tile"
_log = logging.getLogger(__name__)
_given: ContextVar[Mapping[Key, Tile] | None] = ContextVar("tiles", default=None)


class TileChoice:
    """A table of tiles whose entries may be tuned; called as the table.

    Args:
        table: from architecture and sizes, all of them integers, to the tile.
        owned: as in `candidates`.
        walked: as in `candidates`.
    """

    def __init__(self, table: Callable[..., Tile], owned: Side | None, walked: Side | None) -> None:
        functools.update_wrapper(self, table)
        self.kernel = table.__name__.removesuffix(_SUFFIX)
        self.table = table
        self._sides = {"owned": owned, "walked": walked}

    def __call__(self, *key: int) -> Tile:
        """The tile to launch with."""
        given = _given.get()
        tiles = _in_use() if given is None else given
        return tiles.get((self.kernel, key)) or self.table(*key)

    def candidates(self, *key: int) -> list[Tile]:
        """The tiles that may be used: that of the table, and its neighbours."""
        return candidates(self.table(*key), **self._sides)


def tunable(*, owned: Side | None = None, walked: Side | None = None) -> Callable[[Callable[..., Tile]], TileChoice]:
    """Decorate a table of tiles, `KERNEL_tile(arch, ...)`."""
    return lambda table: TileChoice(table, owned, walked)


@contextmanager
def use_tiles(tiles: Mapping[Key, Tile]) -> Iterator[None]:
    """Launch with these tiles and otherwise the tables', whatever was measured; in this thread."""
    token = _given.set(tiles)
    try:
        yield
    finally:
        _given.reset(token)


class TunedTiles(NamedTuple):
    """What was measured on a GPU, and in words where that is, or why there is none."""

    tiles: Mapping[Key, Tile]
    detail: str


@functools.cache
def tuned_tiles(device: int) -> TunedTiles:
    """Read the file of a device. Never raises; logs the outcome once."""
    if os.environ.get(SWITCH) == "0":
        return TunedTiles({}, f"tiles of the tables: {SWITCH}=0")
    gpu = Gpu.at(device)
    file = find(gpu)
    if file is None:
        return TunedTiles({}, f"tiles of the tables: none were tuned on {gpu.name} (sparseattn tune)")
    try:
        found = {key: measured.tile for key, measured in read(file, gpu).items()}
    except TunedFileError as error:
        _log.warning("Triton kernels: %s is not used: %s. Delete it, or make it anew: sparseattn tune", file, error)
        return TunedTiles({}, f"tiles of the tables, not of {file}: {error}")
    _log.info("Triton kernels: %d tuned tiles of %s", len(found), file)
    return TunedTiles(found, f"tuned tiles, {len(found)} in {file}")


def detail() -> str:
    """One line for `sparseattn backends`."""
    return tuned_tiles(torch.cuda.current_device()).detail


def _in_use() -> Mapping[Key, Tile]:
    """Those of the current GPU; none where no GPU is in use, as when compiling for one that is not here."""
    return tuned_tiles(torch.cuda.current_device()).tiles if torch.cuda.is_initialized() else {}
