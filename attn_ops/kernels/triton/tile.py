"""What a program of a kernel computes at a time, and what else may be tried in its place."""

from __future__ import annotations

from typing import Literal, NamedTuple

Side = Literal["rows", "keys"]
_LEAST_SIDE = 16
_LEAST_WARPS = 4
_MOST_WARPS = 8
_LEAST_STAGES = 2


class Tile(NamedTuple):
    """Queries and keys of one step, warps of a program, and depth of the software pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def candidates(tile: Tile, *, owned: Side | None = None, walked: Side | None = None) -> list[Tile]:
    """The tile, then its neighbours: one thing changed, and never so that a thread holds more of the tile.

    So hardly any of them spills registers if the tile does not; shared memory may be too small for a deeper pipeline.

    Args:
        tile: what the table says.
        owned: the side that a program computes, and may halve together with its warps; None: it must stay.
        walked: the side that a program walks in steps, and may halve; None: it must stay.
    """
    neighbours = [
        tile._replace(stages=tile.stages + 1),
        tile._replace(stages=max(_LEAST_STAGES, tile.stages - 1)),
        tile._replace(warps=min(2 * tile.warps, _MOST_WARPS)),
    ]
    if owned is not None and getattr(tile, owned) > _LEAST_SIDE:
        halved = _halved(tile, owned)
        neighbours.append(halved._replace(warps=max(_LEAST_WARPS, tile.warps // 2)))
    if walked is not None and getattr(tile, walked) > _LEAST_SIDE:
        neighbours.append(_halved(tile, walked))
    return list(dict.fromkeys([tile, *neighbours]))


def _halved(tile: Tile, side: Side) -> Tile:
    return tile._replace(rows=tile.rows // 2) if side == "rows" else tile._replace(keys=tile.keys // 2)
