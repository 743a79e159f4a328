"""What a rule may not say: unknown or unusable backends, contradictions, and conditions that nothing can meet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..attn_ops.errors import PolicyError, nearest
from ..attn_ops.registry import backends
from ..attn_ops.spec import BackendSpec, Support

if TYPE_CHECKING:
    from .rule import Rule

DENSE = "dense"
"""In `use`: leave the site as SDPA."""


def specs_of(use: Iterable[str]) -> list[BackendSpec]:
    """The backends of these names, "dense" left out.

    Raises:
        PolicyError: if a name is unknown, or of a backend that no policy can choose.
    """
    known = backends()
    specs = []
    for name in use:
        if name == DENSE:
            continue
        if name not in known:
            selectable = [spec.name for spec in known.values() if spec.selectable]
            raise PolicyError(f"use: unknown backend {name!r}. {nearest(name, [*selectable, DENSE])}")
        if not known[name].selectable:
            raise PolicyError(
                f"use: a policy cannot choose {name}: its op takes an argument that no graph has. "
                f"Call torch.ops.sparseattn.{known[name].op} in the model."
            )
        specs.append(known[name])
    return specs


def check_rule(rule: Rule) -> None:
    """Raises PolicyError if the rule contradicts itself or no call could satisfy it."""
    if rule.max_seq is not None and rule.min_seq > rule.max_seq:
        raise PolicyError(f"min_seq {rule.min_seq} is larger than max_seq {rule.max_seq}. Swap or remove one.")
    _check_dense(rule)
    _check_mode(rule)
    specs = specs_of(rule.use)
    _check_provider(rule, specs)
    if rule.mode != "never" and DENSE not in rule.use:
        _check_possible(rule, specs)


def _check_dense(rule: Rule) -> None:
    if DENSE not in rule.use:
        return
    if rule.use[-1] != DENSE:
        raise PolicyError('use: "dense" always serves, so what follows it is never reached. Put it last.')
    if rule.mode == "never":
        raise PolicyError('use: "dense" cannot be forbidden. Name what must serve instead, with mode = "require".')
    if rule.mode == "require" and len(rule.use) > 1:
        raise PolicyError('use: "dense" always serves, so mode = "require" cannot fail. Write mode = "prefer".')


def _check_mode(rule: Rule) -> None:
    if rule.mode == "never" and (rule.params or rule.only_if_faster):
        raise PolicyError('mode = "never" forbids whatever the parameters. Remove params and only_if_faster.')
    if rule.mode == "require" and rule.only_if_faster:
        raise PolicyError('mode = "require" and only_if_faster contradict each other. Write mode = "prefer".')


def _check_provider(rule: Rule, specs: list[BackendSpec]) -> None:
    known = {provider.name for spec in specs for provider in spec.providers}
    if rule.provider is not None and rule.provider not in known:
        hint = nearest(rule.provider, known)
        raise PolicyError(f"provider: {', '.join(rule.use)}: unknown provider {rule.provider!r}. {hint}")


def _check_possible(rule: Rule, specs: list[BackendSpec]) -> None:
    obstacles = [_obstacle(rule, spec) for spec in specs]
    if all(obstacles):
        raise PolicyError(
            f"no call can satisfy this rule: {'; '.join(filter(None, obstacles))}. Change use, or remove the condition."
        )


def _obstacle(rule: Rule, spec: BackendSpec) -> str | None:
    pinned = [provider for provider in spec.providers if provider.name == rule.provider]
    if rule.provider is not None and not pinned:
        return f"{spec.name} has no provider {rule.provider!r}"
    for name, support in ((spec.name, spec.support), *((f"{spec.name}/{p.name}", p.support) for p in pinned)):
        if reason := _contradiction(rule, support):
            return f"{name} {reason}"
    return None


def _contradiction(rule: Rule, support: Support) -> str | None:
    low, high = support.head_dim
    if rule.kind == "cross" and not support.cross:
        return "takes no cross-attention"
    if rule.head_dim and not any(low <= size <= high for size in rule.head_dim):
        return f"takes head_dim {low} to {high}, not {' or '.join(map(str, rule.head_dim))}"
    if rule.dtype and not set(rule.dtype) & set(support.dtype_names):
        return f"takes {' or '.join(support.dtype_names)}, not {' or '.join(rule.dtype)}"
    return None
