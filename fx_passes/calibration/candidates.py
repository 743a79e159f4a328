"""Candidates: the settings that calibration tries at every site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...attn_ops.errors import PolicyError
from ...attn_ops.param import numbers, varies
from ...attn_ops.registry import backend
from ...lowering.rule import Rule

RATIOS = (1.0, 0.8, 0.6, 0.45, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03)
"""Fractions of the key blocks to keep, for a backend that is given by its name alone; 1 is for a head beside others."""

DEFAULT = ("block_topk",)


@dataclass(frozen=True)
class Candidate:
    """One setting of one backend.

    Args:
        rule: what is tried; where it does not match a site, or cannot be served, it is not tried there.
        rung: the parameter that may differ by head, as its name and value; ("", 0.0) if the backend has none.
    """

    rule: Rule
    rung: tuple[str, float]

    @property
    def family(self) -> Rule:
        """The rule without its rung: candidates that have it in common may serve the heads of one site together."""
        return self.with_params({name: value for name, value in self.rule.params if name != self.rung[0]})

    def with_params(self, params: Mapping[str, Any], **fields: Any) -> Rule:
        """The rule with other parameters and fields; what else it asks, such as a provider or a layout, stays."""
        return Rule(**{**self.rule.to_dict(), **fields, "params": params})

    @property
    def kept(self) -> float | None:
        """The share of the scores that it computes; None if the rung does not say."""
        name, value = self.rung
        return {"keep_ratio": value, "sparsity": 1.0 - value}.get(name)


def expand(candidates: Sequence[str | Rule]) -> list[Candidate]:
    """The settings that are tried, each a rule with one backend; a name stands for a ladder of ratios.

    Raises:
        PolicyError: if a candidate is neither, names several backends or "dense", or already differs by head or step.
    """
    found: list[Candidate] = []
    for given in candidates:
        if isinstance(given, str):
            found += [_candidate(rule) for rule in _ladder(given)]
        elif isinstance(given, Rule):
            found.append(_candidate(given))
        else:
            raise PolicyError(
                f'calibrate: a candidate is a backend\'s name or a Rule, got {given!r}. Write "block_topk".'
            )
    if not found:
        raise PolicyError('calibrate: no candidates. Write for example candidates=["block_topk"].')
    return found


def _ladder(name: str) -> list[Rule]:
    names = {param.name for param in backend(name).params if param.tensor}
    if "keep_ratio" in names:
        return [Rule(name, params={"keep_ratio": ratio}) for ratio in RATIOS]
    if "sparsity" in names:
        return [Rule(name, params={"sparsity": round(1 - ratio, 6)}) for ratio in RATIOS]
    return [Rule(name)]


def _candidate(rule: Rule) -> Candidate:
    if len(rule.use) != 1 or rule.use == ("dense",) or rule.mode != "prefer":
        raise PolicyError(f"calibrate: a candidate is a rule with one backend and mode prefer, got {rule}.")
    if rule.steps is not None:
        raise PolicyError(f"calibrate: {rule} names steps. Give the samples theirs, and buckets.")
    if any(varies(value) for _, value in rule.params):
        raise PolicyError(
            f"calibrate: {rule} differs by head or step already. Give one number: calibration finds those."
        )
    taken = {param.name for param in backend(rule.use[0]).params if param.tensor}
    rungs = [(name, float(next(iter(numbers(value))))) for name, value in rule.params if name in taken]
    return Candidate(rule, rungs[0] if rungs else ("", 0.0))
