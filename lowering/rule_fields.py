"""The fields of a rule: from what a user writes, in Python or in a file, to one normal form each.

Every function returns the normal form or raises a PolicyError that begins with the field's name; whoever reads a file
puts the place in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..attn_ops.call import FLOAT_DTYPES, Params, ParamValue, dtype_name
from ..attn_ops.errors import PolicyError, nearest
from ..attn_ops.spec import BackendSpec

_EXAMPLES = {
    "use": '"sage"',
    "modules": '"blocks.*.attn1"',
    "min_seq": "2048",
    "max_seq": "65536",
    "head_dim": "128",
    "dtype": '"bfloat16"',
    "only_if_faster": "true",
    "provider": '"triton"',
    "params": "{ keep_ratio = 0.4 }",
    "why": '"first blocks stay dense"',
    "name": '"mine"',
    "version": "1",
}


def wrong(field: str, must: str, got: object) -> PolicyError:
    """The error for a field of a wrong type: what it must be, what was given, and a line to write instead."""
    return PolicyError(f"{field} must {must}, got {got!r}. Write for example {field} = {_EXAMPLES[field]}.")


def as_text(field: str, value: object) -> str:
    """A str."""
    if not isinstance(value, str):
        raise wrong(field, "be a str", value)
    return value


def as_flag(field: str, value: object) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise wrong(field, "be true or false", value)
    return value


def as_integer(field: str, value: object, low: int) -> int:
    """An int of at least `low`; a bool is none."""
    if type(value) is not int or value < low:
        raise wrong(field, f"be an int of at least {low}", value)
    return value


def as_names(field: str, value: object) -> tuple[str, ...]:
    """Names, from a str with commas or a list of str: at least one, none empty, none twice."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise wrong(field, "be a str, or a list of str", value)
    names = tuple(part.strip() for part in parts)
    if not names or not all(names) or len(set(names)) != len(names):
        raise wrong(field, "name at least one, each once", value)
    return names


def as_sizes(field: str, value: object) -> tuple[int, ...]:
    """Positive ints, sorted, from None (any), an int or a list of int."""
    values = [] if value is None else [value] if isinstance(value, int) else value
    if not isinstance(values, list | tuple) or not all(type(size) is int and size > 0 for size in values):
        raise wrong(field, "be a positive int, or a list of them", value)
    return tuple(sorted(set(values)))


def as_dtypes(field: str, value: object) -> tuple[str, ...]:
    """Names of dtypes, sorted, from None (any), a name, a torch.dtype or a list of these."""
    values = [] if value is None else [value] if isinstance(value, torch.dtype) else value
    values = values.split(",") if isinstance(values, str) else values
    if not isinstance(values, list | tuple) or not all(isinstance(item, str | torch.dtype) for item in values):
        raise wrong(field, "be the name of a dtype, or a list of them", value)
    names = {item.strip() if isinstance(item, str) else dtype_name(item) for item in values}
    known = [dtype_name(dtype) for dtype in FLOAT_DTYPES]
    for name in sorted(names - set(known)):
        raise PolicyError(f"{field}: unknown dtype {name!r}. {nearest(name, known)}")
    return tuple(sorted(names))


def as_choice(field: str, value: object, choices: tuple[str, ...]) -> str:
    """One of `choices`."""
    if not isinstance(value, str) or value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else f"Known: {', '.join(choices)}."
        raise PolicyError(f"{field} must be one of these, got {value!r}. {hint}")
    return value


def as_params(value: object, specs: Sequence[BackendSpec]) -> Params:
    """Sorted (name, value) pairs; each a parameter of some backend in `specs`, in the range of all that have it."""
    given = _table(value)
    known = {name for spec in specs for name in spec.param_names}
    if {"keep_ratio", "sparsity"} <= set(given):
        raise PolicyError("params: keep_ratio and sparsity say the same twice. Remove one.")
    checked: dict[str, ParamValue] = {}
    for name, item in given.items():
        if name not in known:
            owners = " or ".join(spec.name for spec in specs) or "dense"
            raise PolicyError(f"params: {owners} has no parameter {name!r}. {nearest(name, known)}")
        for spec in specs:
            if name in spec.param_names:
                item = spec.check_params({name: item}, f"params of {spec.name}")[name]
        if isinstance(item, float) and not math.isfinite(item):
            raise PolicyError(f"params: {name} must be finite, got {item!r}. Write a number.")
        checked[name] = item  # type: ignore[assignment]  # check_params returns a ParamValue
    return tuple(sorted(checked.items()))


def _table(value: object) -> dict[str, object]:
    """A table, given as one or as the (name, value) pairs of a rule's normal form."""
    if isinstance(value, Mapping):
        return {as_text("params", name): item for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        pairs = list(value)
        if all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            return dict(pairs)
    raise wrong("params", "be a table of names and values", value)
