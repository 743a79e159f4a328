"""SiteCheck: how far one site was from dense attention when it was compared, and whether that is too far."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..attn_ops.call import AttentionCall, dtype_name
from ..attn_ops.registry import backend
from ..lowering.decision import Decision

FACTOR = 3.0
"""The limit where none is given: so many times the tolerance that the backend states, a typical value, not a bound."""
CEILING = 0.9
"""But at most this: an output of zeros has a relative L1 of 1, whatever the method."""

COLUMNS = ("cosine", "rel L1", "NaN/Inf", "limit", "check")


@dataclass(frozen=True)
class SiteCheck:
    """One comparison. Its numbers are over the entries where both outputs are finite.

    Args:
        cosine: of the two outputs as vectors; NaN where one is zero.
        rel_l1: sum of |ours - dense| by the sum of |dense|; NaN where no entry could be compared.
        non_finite: entries that are NaN or infinite in ours and finite in dense attention.
        limit: the largest relative L1 that passes; None where the backend states no tolerance and no limit was given.
        run: the run of the graph that was compared, from 0.
        skipped: why the site could not be compared, or "".
    """

    cosine: float = math.nan
    rel_l1: float = math.nan
    non_finite: int = 0
    limit: float | None = None
    run: int = 0
    skipped: str = ""

    @classmethod
    def read(cls, sums: Sequence[float], limit: float | None, run: int) -> SiteCheck:
        """From the sums that `torch.ops.sparseattn.attention_error` gives."""
        difference, magnitude, product, ours, dense, lost = sums
        norm = math.sqrt(ours * dense)
        cosine = product / norm if norm else math.nan
        nothing = math.nan if lost else math.inf if difference else 0.0
        rel_l1 = difference / magnitude if magnitude else nothing
        return cls(cosine, rel_l1, int(lost), limit, run)

    @property
    def failure(self) -> str:
        """What is wrong, in a phrase with its numbers; "" if nothing is."""
        if self.non_finite:
            return f"{self.non_finite} NaN or infinite values where dense attention has none"
        if self.limit is not None and self.rel_l1 > self.limit:
            return (
                f"relative L1 {self.rel_l1:.3g} to dense attention, limit {self.limit:.3g} (cosine {self.cosine:.4f})"
            )
        return ""

    def cells(self) -> tuple[str, ...]:
        """The check as text, one cell for each of COLUMNS."""
        if self.skipped:
            return ("", "", "", "", f"not checked: {self.skipped}")
        limit = "-" if self.limit is None else f"{self.limit:.3g}"
        verdict = "FAILED" if self.failure else "ok"
        return (f"{self.cosine:.6f}", f"{self.rel_l1:.3g}", str(self.non_finite), limit, verdict)

    def to_dict(self) -> dict[str, Any]:
        """The check as plain values; a number that is not finite is None."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return {**values, "failure": self.failure}


def limit_of(call: AttentionCall, decision: Decision) -> float | None:
    """The limit of a site's relative L1 where none is given; None if its backend states no tolerance."""
    assert decision.backend is not None
    stated = backend(decision.backend).tolerance
    tolerance = stated.get(dtype_name(call.dtype), stated.get("typical"))
    return None if tolerance is None else min(FACTOR * tolerance, CEILING)


def site_key(module: str, source: str, call: AttentionCall, decision: Decision) -> Hashable:
    """What a layer that failed is known by when its graph is compiled again: the same place, asked and served alike."""
    unfixed: dict[str, Any] = dict.fromkeys(call.dynamic, 0)
    fixed = replace(call, **unfixed)
    return module, source, fixed, decision.backend, decision.provider, decision.params
