"""The rules of a policy that serves every place as it was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...attn_ops.call import Kind
from ...attn_ops.schedule import Number, Schedule
from ...lowering.policy import Rule
from .candidates import Candidate
from .choose import Choice
from .ledger import Place

Bucket = tuple[int, int]
"""The first step of a range, and the one after its last."""

_Site = tuple[str, Kind]


def rules_of(
    choices: Mapping[Place, Choice], candidates: Sequence[Candidate], buckets: Sequence[Bucket] | None
) -> list[tuple[Rule, list[Place]]]:
    """The rules, in the order of the places, each with those that it serves; what stays dense has none.

    A site that one backend serves in every bucket has one rule, whose ratio is a table over the steps, so that one
    graph serves them all. Otherwise each bucket has its own rule.

    Args:
        choices: what was chosen, for every place.
        candidates: by their numbers.
        buckets: the ranges of steps by number; None where no step was set.
    """
    sites: dict[_Site, dict[int, Choice]] = {}
    for place, choice in choices.items():
        if not choice.is_dense:
            sites.setdefault((place.module, place.kind), {})[place.bucket] = choice
    rules = []
    for site, served in sites.items():
        for rule, numbers in _rules(site, served, candidates, buckets):
            rules.append((rule, [Place(*site, number) for number in numbers]))
    return rules


def _rules(
    site: _Site,
    served: Mapping[int, Choice],
    candidates: Sequence[Candidate],
    buckets: Sequence[Bucket] | None,
) -> list[tuple[Rule, list[int]]]:
    """The rules of a site, each with the numbers of its buckets."""
    firsts = {bucket: candidates[choice.candidates[0]] for bucket, choice in served.items()}
    rungs = {bucket: _rung(choice, candidates) for bucket, choice in served.items()}
    if buckets is None:
        return [(_rule(site, firsts[0], rungs[0], None), [0])]
    families = {first.family for first in firsts.values()}
    if len(families) == 1 and len(served) == len(buckets) and firsts[0].rung[0]:
        table = tuple(rungs[number] for number, (first, end) in enumerate(buckets) for _ in range(first, end))
        same = all(entry == table[0] for entry in table)
        ratio = table[0] if same else Schedule(kind="table", values=table)
        return [(_rule(site, firsts[0], ratio, None), list(range(len(buckets))))]
    return [(_rule(site, firsts[i], rungs[i], buckets[i]), [i]) for i in sorted(served)]


def _rung(choice: Choice, candidates: Sequence[Candidate]) -> Number:
    """The ratio of all heads, or of each."""
    ratios = tuple(candidates[number].rung[1] for number in choice.candidates)
    return ratios[0] if len(set(ratios)) == 1 else ratios


def rule_of(place: Place, choice: Choice, candidates: Sequence[Candidate]) -> Rule:
    """What serves one place, which is not dense, in its range of steps."""
    return _rule((place.module, place.kind), candidates[choice.candidates[0]], _rung(choice, candidates), None)


def _rule(site: _Site, like: Candidate, rung: Any, steps: Bucket | None) -> Rule:
    (module, kind), name = site, like.rung[0]
    params = {**dict(like.rule.params), **({name: rung} if name else {})}
    within = None if steps is None else f"{steps[0]}:{steps[1]}"
    return like.with_params(params, modules=module or "*", kind=kind, steps=within)
