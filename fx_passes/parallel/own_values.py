"""of_rank: a decision for the heads of one rank. A parameter that has a value for each head gets theirs."""

from __future__ import annotations

from dataclasses import replace

from ...attn_ops.call import ParamValue
from ...attn_ops.param import Param
from ...attn_ops.registry import backend
from ...attn_ops.schedule import Schedule
from ...lowering.decision import Decision
from ...lowering.head_split import HeadSplit


def of_rank(decision: Decision, heads: HeadSplit, rank: int) -> Decision:
    """The decision for one rank of a Ulysses group."""
    if decision.backend is None:
        return decision
    known = {param.name: param for param in backend(decision.backend).params}
    params = tuple((name, _own(known[name], value, heads, rank)) for name, value in decision.params)
    return replace(decision, params=params)


def _own(param: Param, value: ParamValue, heads: HeadSplit, rank: int) -> ParamValue:
    """The value for one rank's heads, which is another only where every head has its own."""
    if isinstance(value, Schedule):
        return replace(value, values=tuple(_own(param, entry, heads, rank) for entry in value.values))  # type: ignore[misc]
    if not isinstance(value, tuple) or not (param.repeats or (param.tensor and type(param.default) is not tuple)):
        return value
    each = len(param.default) if isinstance(param.default, tuple) else 1
    return heads.of_rank(rank, value) if len(value) == each * heads.heads > each else value
