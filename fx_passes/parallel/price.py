"""price: what the sites of a report would send and take on GPUs that are not here. A prediction.

A report does not show shards: self-attention over the longest sequence is taken to be over shards, any shorter one to
be of text that every rank holds.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from ...attn_ops.call import AttentionCall
from ...attn_ops.capability import Capability
from ...attn_ops.errors import ParallelError, PolicyError
from ...attn_ops.registry import backend
from ...attn_ops.schedule import Schedule
from ...attn_ops.sharding import local_tokens
from ...lowering.communication_model import Attend, Cluster, ParallelCost, Split, parallel_cost
from ...lowering.cost_model import predicted_seconds
from ...lowering.decision import Decision
from ...lowering.head_split import HeadSplit
from ..asked_density import asked_density
from ..report import Report, Row
from . import ring_sparse
from .communication import NO_SHARDS, Communication
from .in_parts import IN_PARTS
from .ring import Ring
from .ulysses import Piece

_OWN_QUERIES = "keys and values are on every rank: each answers its own queries"


def price(report: Report, mesh: Sequence[int], machine: Capability) -> Report:
    """Predict communication and time of every site of a report.

    Args:
        report: its sites, decided for this machine.
        mesh: (ranks,), which share each attention as method="auto" does, or (ring, ulysses).
        machine: each of the GPUs.

    Returns:
        The report with the exchange and the cost of every site that can be read, and a note on what was assumed.

    Raises:
        PolicyError: on a wrong mesh, or if nothing is known of the machine or of its links.
        ParallelError: if a site cannot be shared so: by its heads, or in parts.
    """
    sizes, cluster = _checked(mesh), Cluster.of(machine)
    tokens = max((row.call.seq_q for row in report.rows if row.call.kind == "self"), default=0)
    rows, alone = [], 0.0
    for row in report.rows:
        if row.call.head_dim:  # else nothing is known of it
            attend = functools.partial(_seconds, row.decision, machine)
            alone += attend(row.call)
            row = _priced(row, sizes, attend, cluster, sharded=row.call.seq_q == tokens)
        rows.append(row)
    return replace(report, rows=tuple(rows), notes=(*report.notes, _note(rows, sizes, machine, alone)))


def _checked(mesh: Sequence[int]) -> tuple[int, ...]:
    sizes: object = mesh
    if isinstance(sizes, list | tuple) and len(sizes) in (1, 2) and all(type(n) is int and n > 0 for n in sizes):
        return tuple(sizes)
    raise PolicyError(
        f"mesh: mesh must be (ranks,) or (ring, ulysses), ints of at least 1, got {mesh!r}. Write mesh=(8,)."
    )


def _seconds(decision: Decision, machine: Capability, call: AttentionCall) -> float:
    share = _share(decision)
    return predicted_seconds(call, decision.backend, 1.0 if math.isnan(share) else share, machine)


def _share(decision: Decision) -> float:
    """Which of its scores a site computes, on the mean over heads; NaN if that is not known before it runs."""
    if decision.backend is None or backend(decision.backend).kind != "sparse":
        return 1.0
    params = dict(backend(decision.backend).complete(decision.params))
    if any(isinstance(value, Schedule) for value in params.values()):
        return math.nan
    return statistics.fmean(asked_density(params, decision.layout))


def _priced(row: Row, sizes: tuple[int, ...], attend: Attend, cluster: Cluster, *, sharded: bool) -> Row:
    call, ranks = row.call, math.prod(sizes)
    if call.kind == "self" and sharded and ranks > 1:
        layout = row.decision.layout or call.layout
        text = layout.text_tokens if layout else 0
        costs = [
            parallel_cost(call, split, attend, cluster, text_tokens=text) + _choosing(row, split, cluster)
            for split in _ways(row, sizes)
        ]
        best = costs[0]
        sent = Communication(str(best.split), _why(call, costs), best.collectives, best.sent)
        return replace(row, communication=sent, cost=best)
    part = call if call.kind == "self" else replace(call, seq_q=local_tokens(call.seq_q, ranks))
    stays = ParallelCost(Split(1, 1), attention=attend(part))
    return replace(row, communication=Communication("none", NO_SHARDS if part is call else _OWN_QUERIES), cost=stays)


def _choosing(row: Row, split: Split, cluster: Cluster) -> ParallelCost:
    """The sums of blocks that a ring gathers before anything else; nothing for exact attention."""
    if row.decision.backend != "block_topk" or split.ring == 1:
        return ParallelCost(split)
    call, params = row.call, dict(backend("block_topk").complete(row.decision.params))
    layout, heads = row.decision.layout or call.layout, HeadSplit.of(call.heads, call.kv_heads, split.ulysses)
    text = layout.text_tokens if layout else 0
    video = call.seq_q - text
    pieces = [Piece(local_tokens(video, split.ranks) * split.ulysses, video, sharded=True)]
    pieces.insert(0 if layout and layout.text_first else 1, Piece(text, text, sharded=False))
    ring = Ring(tuple(pieces), call.causal, split.ring, 0, "")
    blocks = cast(int, params["block_q"]), cast(int, params["block_k"])
    sent = ring_sparse.payload(ring, heads.own, heads.own_kv, call.head_dim, call.batch, blocks)
    waiting = cluster.link(split.ranks).seconds(sent)
    return ParallelCost(split, sent=sent, collectives=1, links=waiting, waiting=waiting)


def _ways(row: Row, sizes: tuple[int, ...]) -> list[Split]:
    """How ranks can share a site: first what is asked or would be chosen, then what else could be.

    Raises:
        ParallelError: if they cannot.
    """
    ring, ulysses = sizes if len(sizes) == 2 else (1, sizes[0])
    in_parts, chosen = row.decision.backend in IN_PARTS, Split(ulysses, ring)
    if ring > 1 and not in_parts:
        raise ParallelError(
            f"mesh: the ring must be 1 for {row.name}, got {ring}: {row.decision.backend} cannot attend to a part of "
            f"the keys. Use mesh=({chosen.ranks},), or another rule."
        )
    if len(sizes) == 2 or not in_parts:
        return [chosen]
    around = Split(1, ulysses)
    return [around] if ulysses > row.call.heads else [chosen, around]


def _why(call: AttentionCall, costs: Sequence[ParallelCost]) -> str:
    """The heads of each rank, and how long what was not chosen would take."""
    split, others = costs[0].split, costs[1:]
    why = str(HeadSplit.of(call.heads, call.kv_heads, split.ulysses)) if split.ulysses > 1 else ""
    if split.method == "ring":
        why = f"{call.heads} heads are too few for {split.ranks} ranks" if split.ranks > call.heads else "asked for"
    times = [f"{other.split} would take {1e3 * other.seconds:.3g} ms" for other in others]
    return "; ".join([why, *times])


def _note(rows: Sequence[Row], sizes: tuple[int, ...], machine: Capability, alone: float) -> str:
    costs = [row.cost for row in rows if row.cost]
    total, waiting = sum(cost.seconds for cost in costs), sum(cost.waiting for cost in costs)
    unread = len(rows) - len(costs)
    guessed = sum(bool(row.cost) and math.isnan(_share(row.decision)) for row in rows)
    text = (
        f"predicted for a mesh {sizes} of {machine} in nodes of 8, from published rates, not measured: a forward's "
        f"attention takes {1e3 * total:.3g} ms, {1e3 * waiting:.3g} ms of it for communication; on one GPU "
        f"{1e3 * alone:.3g} ms"
    )
    if guessed:
        text += f"; what only data or steps decide to keep is priced as if all were kept, at {guessed} of the sites"
    if unread:
        text += f"; {unread} of the sites cannot be read and have no price"
    return text
