"""The rules and parameters in which two policies differ."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

from .policy import Policy
from .rule import Rule

_UNSET = "not set"


def differences(first: Policy, second: Policy) -> list[str]:
    """What turns the first policy into the second, a line each; none if they decide alike.

    Rules of the same `use` and `modules`, in the same order, are compared by field: "rule 2: params.keep_ratio: 0.3 ->
    0.2". The others are whole lines: "- rule 3: ..." is only in the first, "+ rule 3: ..." only in the second. Names,
    reasons and what was measured decide nothing and are not compared.
    """
    keys = [[(rule.use, rule.modules) for rule in policy.rules] for policy in (first, second)]
    lines: list[str] = []
    for tag, a, b, c, d in SequenceMatcher(a=keys[0], b=keys[1], autojunk=False).get_opcodes():
        if tag == "equal":
            for old, new in zip(range(a, b), range(c, d), strict=True):
                number = f"{old + 1}" if old == new else f"{old + 1} -> {new + 1}"
                lines += (f"  rule {number}: {change}" for change in _changes(first.rules[old], second.rules[new]))
        else:
            lines += (f"- rule {number + 1}: {first.rules[number]}" for number in range(a, b))
            lines += (f"+ rule {number + 1}: {second.rules[number]}" for number in range(c, d))
    return lines


def _changes(old: Rule, new: Rule) -> Iterator[str]:
    before, after = _settings(old), _settings(new)
    for name in dict.fromkeys([*before, *after]):
        values = before.get(name, _UNSET), after.get(name, _UNSET)
        if values[0] != values[1]:
            yield f"{name}: {values[0]} -> {values[1]}"


def _settings(rule: Rule) -> dict[str, Any]:
    """What decides: the mode, and the other fields that differ from their default, each parameter by itself."""
    given = rule.to_dict()
    params = {f"params.{name}": value for name, value in given.pop("params", {}).items()}
    given.pop("why", None)
    return {"mode": rule.mode, **given, **params}
