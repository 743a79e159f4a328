"""Communication: what one site sends to other ranks, and why so. Plain values, for the report."""

from __future__ import annotations

from dataclasses import dataclass

NO_SHARDS = "every rank holds all of its tokens"

COLUMNS = ("exchange", "sent", "exchange because")


@dataclass(frozen=True)
class Communication:
    """The exchange around one site.

    Args:
        method: "ulysses", "ulysses, INT8" or "ring", or "none" where nothing has to be sent.
        why: why this method.
        collectives: how many, in a forward pass.
        sent: bytes that leave this rank in a forward pass; a backward pass sends as many again.
    """

    method: str
    why: str
    collectives: int = 0
    sent: int = 0

    def cells(self) -> tuple[str, ...]:
        """The exchange as text, one cell for each of COLUMNS."""
        return (self.method, size_text(self.sent) if self.collectives else "", self.why)


def size_text(count: int) -> str:
    """`1.5 MB` for 1500000; decimal, as links are sold."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
