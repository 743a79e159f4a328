"""A row as one line for the screen."""

from __future__ import annotations

from collections.abc import Mapping

from .record import Row, Scalar


def line(row: Row) -> str:
    """What the row knows; the files hold more digits."""
    parts = [row.name, _pairs(row.setting)]
    if row.missing:
        return " | ".join([*filter(None, parts), f"missing: {row.missing}"])
    if row.density is not None:
        parts.append(f"density {row.density:.4f}")
    if row.time is not None:
        parts.append(_time(row))
    if row.rates:
        of_matmul = f", {row.of_matmul:.2f} of torch.mm" if row.of_matmul is not None else ""
        parts.append(f"{row.rates['executed'] / 1e9:.1f} GFLOP/s{of_matmul}")
    parts += [f"error {_pairs(row.error)}" if row.error else "", _pairs(row.figures)]
    return " | ".join(filter(None, parts))


def _time(row: Row) -> str:
    assert row.time is not None
    spread = "" if row.time.low is None else f" ({row.time.low:.3f} to {row.time.high:.3f})"
    speed = "" if row.speed is None else f", {row.speed:.2f} times dense, efficiency {row.efficiency or 0:.2f}"
    return f"{row.time.ms:.3f} ms{spread}{speed if row.density is not None else ''}"


def _pairs(values: Mapping[str, Scalar]) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )
