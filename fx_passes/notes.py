"""Notes of a report: where a policy does not fit what it is applied to.

A compiled graph says which rules match nothing in it; which model it is part of it does not say, so only `explain`,
which has the model, compares fingerprints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..lowering.fingerprint import fingerprint
from ..lowering.measured import Measured
from ..lowering.policy import Policy
from .parallel.communication import NO_SHARDS
from .report import Row

_LISTED = 8
"""Rules that are noted one by one; more are noted together, by number."""


def unmatched_rules(policy: Policy, rows: Iterable[Row]) -> tuple[str, ...]:
    """Notes on the rules that match none of the sites at any step; none where there are no sites."""
    sites = [(row.call, row.module) for row in rows]
    if not sites:
        return ()
    always = [replace(rule, steps=None) for rule in policy.rules]
    unmatched = [
        number
        for number, rule in enumerate(always, 1)
        if all(rule.mismatch(call, module) is not None for call, module in sites)
    ]
    if len(unmatched) > _LISTED:
        return (f"{len(unmatched)} rules match no site: {', '.join(map(str, unmatched))}",)
    return tuple(f"rule {number} matches no site: {policy.rules[number - 1]}" for number in unmatched)


def unshared(rows: Iterable[Row]) -> tuple[str, ...]:
    """A note where ranks were to share the tokens, and every site has all of them."""
    whys = {row.communication.why for row in rows if row.communication}
    if whys != {NO_SHARDS}:
        return ()
    return ("parallel: no site has shards. Call sparseattn.parallel.shard_model, or say how many tokens there are.",)


def measured_elsewhere(policy: Policy, model: Callable[..., Any]) -> Iterator[str]:
    """Notes where a policy was measured on another model than this one, or with other rules than it has."""
    measured = policy.measured
    if measured is None:
        return
    if measured.policy not in (None, policy.hash):
        yield f"the rules are not those that were measured: their hash was {measured.policy}, it is {policy.hash}"
    if measured.model is None:
        return
    if not isinstance(model, nn.Module):
        yield f"{_measured_on(measured)}; this is a function, which has no fingerprint to compare"
    elif (own := fingerprint(model)) != measured.model:
        yield f"{_measured_on(measured)}; this model is {own}: expect another error and speed-up"


def _measured_on(measured: Measured) -> str:
    return f"the policy was measured on model {measured.model}"
