"""Report: every attention site of one compiled graph, what it became, and why everything else did not.

`str()` is a table to read at a glance, `to_json()` for programs, `to_html()` for a page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..attn_ops.call import AttentionCall, dtype_name
from ..attn_ops.schedule import Schedule
from ..lowering.communication_model import ParallelCost
from ..lowering.decision import Decision
from .hoist_tiling import Hoisted
from .parallel.communication import COLUMNS as COMMUNICATION_COLUMNS
from .parallel.communication import Communication, size_text
from .report_page import page
from .site_check import COLUMNS as CHECK_COLUMNS
from .site_check import SiteCheck
from .table import aligned

_COLUMNS = ("#", "layer", "kind", "B,H,S,D", "dtype", "chosen", "provider", "params", "rule", "why")
_PRICE_COLUMNS = ("attention ms", "waiting ms")
_LISTED = 6
DENSE = "sdpa"
"""How a site that stays as it was is shown."""


@dataclass(frozen=True)
class Row:
    """One site: where it is, what it asks, what was decided, and how far that was from dense attention if compared."""

    module: str
    source: str
    call: AttentionCall
    decision: Decision
    check: SiteCheck | None = None
    communication: Communication | None = None
    cost: ParallelCost | None = None

    @property
    def name(self) -> str:
        """The layer, else the line that asks."""
        return self.module or self.source or "?"

    def cells(self) -> tuple[str, ...]:
        """The row's columns as text, without its number."""
        call, decision = self.call, self.decision
        shape = call.shape if call.head_dim else "?"
        layout = decision.layout or call.layout
        settings = [*decision.params, *([("grid", layout)] if layout else [])]
        params = " ".join(f"{name}={_brief(value)}" for name, value in settings)
        rule = "-" if decision.rule is None else str(decision.rule)
        chosen, provider = decision.backend or DENSE, decision.provider or "torch"
        dtype = dtype_name(call.dtype) if call.head_dim else "?"
        return (
            self.name,
            call.kind,
            shape,
            dtype,
            chosen,
            provider,
            params,
            rule,
            decision.why,
        )

    def columns(self) -> dict[str, str]:
        """The same by the names of the columns."""
        return dict(zip(_COLUMNS[1:], self.cells(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        call = {**asdict(self.call), "dtype": dtype_name(self.call.dtype), "dynamic": list(self.call.dynamic)}
        params = {name: v.to_dict() if isinstance(v, Schedule) else v for name, v in self.decision.params}
        decision = {**asdict(self.decision), "params": params}
        check = {"check": self.check.to_dict()} if self.check else {}
        sent = {"communication": asdict(self.communication)} if self.communication else {}
        cost = {"cost": asdict(self.cost)} if self.cost else {}
        site = {"module": self.module, "source": self.source, "call": call, "decision": decision}
        return {**site, **check, **sent, **cost}


def _communication_cells(row: Row) -> tuple[str, ...]:
    return row.communication.cells() if row.communication else ("",) * len(COMMUNICATION_COLUMNS)


def _price_cells(row: Row) -> tuple[str, ...]:
    return (f"{1e3 * row.cost.attention:.3g}", f"{1e3 * row.cost.waiting:.3g}") if row.cost else ("", "")


def _check_cells(row: Row) -> tuple[str, ...]:
    return row.check.cells() if row.check else ("",) * len(CHECK_COLUMNS)


def _brief(value: object) -> str:
    """A list as 3x3x3, the first entries of a long one; what has blanks in brackets."""
    if not isinstance(value, tuple):
        return f"({value})" if isinstance(value, Schedule) else str(value)
    return "x".join(map(str, value[:_LISTED])) + ("..." if len(value) > _LISTED else "")


@dataclass(frozen=True)
class Report:
    """All decisions of one graph.

    Args:
        rows: one per site, in graph order.
        policy: name of the policy.
        policy_hash: its hash.
        capability: the machine decided for, as text.
        hoisted: the tiling that was taken out of the sites.
        named: the backends that the policy names.
        notes: where the policy does not fit what it is applied to.
    """

    rows: tuple[Row, ...] = ()
    policy: str = ""
    policy_hash: str = ""
    capability: str = ""
    hoisted: Hoisted = field(default_factory=Hoisted)
    named: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The decisions alone."""
        return tuple(row.decision for row in self.rows)

    @property
    def chosen(self) -> Counter[str]:
        """How many sites became what: {"block_topk": 4, "sdpa": 1}."""
        return Counter(decision.backend or DENSE for decision in self.decisions)

    @property
    def rewritten(self) -> int:
        """Number of sites that became one of our ops."""
        return sum(not decision.is_dense for decision in self.decisions)

    @property
    def communication(self) -> str:
        """What leaves this rank in one forward pass, "" where nothing was asked to."""
        told = [row.communication for row in self.rows if row.communication]
        if not told:
            return ""
        sent, collectives = sum(one.sent for one in told), sum(one.collectives for one in told)
        moved = sum(bool(one.collectives) for one in told)
        return f"{size_text(sent)} sent by each rank in {collectives} collectives around {moved} of {len(told)} sites"

    def summary(self) -> str:
        """One line: `5 attention sites: 4 block_topk, 1 sdpa (policy fast, cpu-avx512)`."""
        counts = ", ".join(f"{count} {name}" for name, count in self.chosen.most_common()) or "nothing to rewrite"
        sites = f"{len(self.rows)} attention site{'' if len(self.rows) == 1 else 's'}"
        tiling = f"; {self.hoisted}" if self.hoisted.sites else ""
        return f"{sites}: {counts} (policy {self.policy}, {self.capability}){tiling}"

    def __add__(self, other: Report) -> Report:
        """The sites of both, for a model that compiles into several graphs; notes on one graph alone are left out."""
        return replace(other, rows=self.rows + other.rows, hoisted=self.hoisted + other.hoisted, notes=())

    def __str__(self) -> str:
        table = aligned(self._table()) if self.rows else []
        title = f"sparseattn · policy {self.policy} ({self.policy_hash}) · {self.capability}"
        sent = [f"communication: {self.communication}"] if self.communication else []
        notes = (f"note: {note}" for note in self.notes)
        return "\n".join([title, *table, self.summary(), *sent, *notes, *self._why_not()])

    def _table(self) -> list[tuple[str, ...]]:
        """Heading and rows; communication, its price and self-check, before the last, only where there is any."""
        table = [_COLUMNS, *((str(i), *row.cells()) for i, row in enumerate(self.rows))]
        for names, cells in (
            (COMMUNICATION_COLUMNS, _communication_cells),
            (_PRICE_COLUMNS, _price_cells),
            (CHECK_COLUMNS, _check_cells),
        ):
            given = [cells(row) for row in self.rows]
            if any(map(any, given)):
                added = [names, *given]
                table = [(*line[:-1], *more, line[-1]) for line, more in zip(table, added, strict=True)]
        return table

    def _why_not(self) -> Iterator[str]:
        """Per candidate that the policy names, its reasons with the number of sites each applied to."""
        reasons: dict[str, Counter[str]] = {}
        for decision in self.decisions:
            for candidate, sentences in decision.rejected:
                reasons.setdefault(candidate, Counter()).update(sentences)
        if reasons:
            yield "why not"
        others = []
        for candidate, counts in sorted(reasons.items()):
            name = candidate.partition("/")[0]
            if name in self.named:
                told = "; ".join(f"{sentence} ({count})" for sentence, count in counts.most_common())
                yield f"  {candidate}: {told}"
            elif name not in others:
                others.append(name)
        if others:
            yield f"  not named by the policy: {', '.join(others)} (to_json() has what each would need)"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "policy": self.policy,
            "policy_hash": self.policy_hash,
            "capability": self.capability,
            "summary": self.summary(),
            "hoisted": asdict(self.hoisted),
            **({"communication": self.communication} if self.communication else {}),
            "notes": list(self.notes),
            "sites": [row.to_dict() for row in self.rows],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self) -> str:
        """The report as the text of one self-contained HTML file, for a phone as for a desk."""
        return page(self)
