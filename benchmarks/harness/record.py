"""Row: one measured thing, and the files of JSON lines that hold them. Every line says where it was measured.

What a row does not know is left out of its line: a missing figure is never a zero.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .machine import Stamp

Scalar = int | float | str | bool


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Args:
        ms: the median.
        low: first quartile; None if only the median was kept.
        high: third quartile.
        repeats: number of runs.
        clock: "thread CPU time", "wall clock" or "CUDA events".
    """

    ms: float
    low: float | None = None
    high: float | None = None
    repeats: int | None = None
    clock: str | None = None


@dataclass(frozen=True)
class Row:
    """One measured thing.

    Args:
        case: the case of a suite that measured it.
        name: what was measured: a method, a provider, a model.
        setting: what it was measured on: sizes, dtype, blocks, threads, direction.
        density: the fraction of query-key pairs that was computed.
        time: its time, selection, quantization and layout included.
        dense: the time of dense attention that took turns with it.
        rates: FLOP/s: "executed", "dense_equivalent", and "torch.mm", which took turns as well.
        error: by measure: "relative_l1", "relative_l2", "cosine", "lse_max"; the key "to" names the truth.
        figures: everything else, with its unit in the key.
        missing: why there are no figures; a row has either this or figures.
        stamp: where and with what; set when it is written.
    """

    case: str
    name: str
    setting: Mapping[str, Scalar] = field(default_factory=dict)
    density: float | None = None
    time: Timing | None = None
    dense: Timing | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    error: Mapping[str, Scalar] = field(default_factory=dict)
    figures: Mapping[str, Scalar] = field(default_factory=dict)
    missing: str | None = None
    stamp: Stamp | None = None

    @property
    def speed(self) -> float | None:
        """How many times as fast as dense attention in the same run."""
        return self.dense.ms / self.time.ms if self.time and self.dense else None

    @property
    def efficiency(self) -> float | None:
        """Density * dense time / time: 1.0 is perfect scaling."""
        return None if self.speed is None or self.density is None else self.density * self.speed

    @property
    def of_matmul(self) -> float | None:
        """The executed rate as a fraction of that of torch.mm."""
        return self.rates["executed"] / self.rates["torch.mm"] if {"executed", "torch.mm"} <= set(self.rates) else None


def to_line(row: Row) -> str:
    """One line of JSON.

    Raises:
        ValueError: if a figure is NaN or infinite: such a row has a `missing` instead.
    """
    return json.dumps(_known(dataclasses.asdict(row)), allow_nan=False)


def from_line(line: str) -> Row:
    """The row of a line.

    Raises:
        TypeError: if it has a field that rows do not have.
    """
    told: dict[str, Any] = json.loads(line)
    types = {"time": Timing, "dense": Timing, "stamp": Stamp}
    return Row(**{name: types[name](**value) if name in types else value for name, value in told.items()})


def write(path: Path, rows: Iterable[Row], stamp: Stamp) -> None:
    """Append stamped rows to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [to_line(dataclasses.replace(row, stamp=stamp)) for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def read(path: Path) -> list[Row]:
    """The rows of a file, in order."""
    return [from_line(line) for line in path.read_text(encoding="utf-8").splitlines()]


def newest(folder: Path) -> dict[str, list[Row]]:
    """Of every case the rows that were measured last, of all files of a folder."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        by_case: dict[str, list[Row]] = {}
        for row in read(path):
            by_case.setdefault(row.case, []).append(row)
        for case, rows in by_case.items():
            if case not in found or _date(rows) >= _date(found[case]):
                found[case] = rows
    return found


def significant(value: float, digits: int = 7) -> float:
    """A figure without the digits that say nothing.

    Raises:
        ValueError: if it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(f"a figure must be finite, got {value}.")
    return float(f"{value:.{digits}g}")


def _date(rows: list[Row]) -> str:
    return max(row.stamp.date for row in rows if row.stamp)


def _known(told: dict[str, Any]) -> dict[str, Any]:
    """Without what is None or empty, and figures to seven digits."""
    kept = {}
    for name, value in told.items():
        if isinstance(value, dict):
            value = _known(value)
        elif isinstance(value, float):
            value = significant(value)
        if value not in (None, {}):
            kept[name] = value
    return kept
