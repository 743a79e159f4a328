"""The command line's `sparseattn policy show | diff | validate`: read policy files; none is ever written."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from ..attn_ops.errors import SparseAttnError
from ..lowering.measured import PARTS
from ..lowering.policy import Policy
from ..lowering.policy_diff import differences
from ..lowering.precedence import DISABLE, effective_policy, use_policy
from ..lowering.rule import Rule
from .table import aligned
from .target import TARGET, load_target, on_one_line

if TYPE_CHECKING:
    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

_FILE = "a .toml or .json file, or the name of a preset"
_COLUMNS = ("rule", "use", "mode", "where", "params", "error", "density", "why")
_SHOWN = ("use", "mode", "params", "why")
"""Fields with a column of their own; the others are in `where`."""


def add_policy(verbs: _Verbs) -> None:
    """Add the verb `policy` to the command line."""
    policy = verbs.add_parser("policy", help="show, compare and check policy files")
    actions = policy.add_subparsers(required=True, metavar="show | diff | validate")
    action = actions.add_parser(
        "show", help="its rules, and what they were measured on", epilog="Exit code: 0, or 2 if it is not valid."
    )
    action.add_argument("file", help=_FILE)
    action.set_defaults(command=_show)
    action = actions.add_parser(
        "diff",
        help="the rules and parameters in which two policies differ",
        epilog="Exit code: 0 if they decide alike, 1 if not, 2 if one is not valid. Names, reasons (why) and what was "
        "measured decide nothing.",
    )
    action.add_argument("first", help=_FILE)
    action.add_argument("second", help=_FILE)
    action.set_defaults(command=_diff)
    action = actions.add_parser(
        "validate",
        help="whether a file is valid, and fits a model",
        epilog="Exit code: 0 if it is valid, and fits the model if one is given; 1 if it is valid and does not fit: a "
        "rule matches nothing or cannot be met, or it was measured on another model or with other rules; 2 if it is "
        "not valid, or on wrong use.",
    )
    action.add_argument("file", help=_FILE)
    action.add_argument("target", nargs="?", help=TARGET)
    action.add_argument("--capability", help='a machine by name, "sm90"; default: this one')
    action.set_defaults(command=_validate)


def _show(options: argparse.Namespace) -> str:
    policy = Policy.load(options.file)
    by_rule = {} if policy.measured is None else {entry.rule: entry.to_dict() for entry in policy.measured.rules}
    rows = [(str(number), *_cells(rule, by_rule.get(number, {}))) for number, rule in enumerate(policy.rules, 1)]
    table = aligned([_COLUMNS, *rows]) if rows else []
    return "\n".join([_title(policy), *table, *_measured_lines(policy)])


def _title(policy: Policy) -> str:
    count = len(policy.rules)
    return f"policy {policy.name} ({policy.hash}): {count} rule{'' if count == 1 else 's'}"


def _cells(rule: Rule, measured: dict[str, Any]) -> tuple[str, ...]:
    given = rule.to_dict()
    where = " ".join(f"{name}={_brief(value)}" for name, value in given.items() if name not in _SHOWN)
    params = " ".join(f"{name}={_brief(value)}" for name, value in given.get("params", {}).items())
    error, density = (str(measured.get(name, "")) for name in ("error", "density"))
    return (_brief(given["use"]), rule.mode, where, params, error, density, rule.why)


def _brief(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _measured_lines(policy: Policy) -> list[str]:
    if policy.measured is None:
        return ["not measured"]
    values = {name: value for name, value in policy.measured.to_dict().items() if name not in PARTS}
    if policy.measured.policy not in (None, policy.hash):
        values["policy"] = f"{policy.measured.policy}, the rules were edited since"
    width = max(map(len, values), default=0)
    return ["measured", *(f"  {name:{width}}  {value}" for name, value in values.items())]


def _diff(options: argparse.Namespace) -> tuple[str, int]:
    first, second = Policy.load(options.first), Policy.load(options.second)
    lines = differences(first, second)
    if lines:
        return "\n".join([f"--- {options.first} ({first.hash})", f"+++ {options.second} ({second.hash})", *lines]), 1
    unlike = "" if first.measured == second.measured else "; what was measured differs"
    return f"they decide alike ({first.hash}){unlike}", 0


def _validate(options: argparse.Namespace) -> str | tuple[str, int]:
    from .explain import explain

    policy = Policy.load(options.file)
    valid = f"{options.file}: valid, {_title(policy)}"
    if options.target is None:
        return valid
    if effective_policy(policy) is None:
        raise SparseAttnError(f"policy validate: {DISABLE} switches every policy off. Unset it.")
    model, args, kwargs = load_target("policy validate", options.target)
    with torch.no_grad(), use_policy(policy), on_one_line(f"policy validate: {options.target}"):
        report = explain(model, *args, capability=options.capability, **kwargs)
    notes = [f"note: {note}" for note in report.notes]
    return "\n".join([valid, report.summary(), *notes]), int(bool(notes))
