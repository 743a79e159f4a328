"""One exception class per mistake. A message names the argument, the requirement, what was given, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseAttnError(Exception):
    """Base class of every error this package raises on purpose."""


class ArgumentError(SparseAttnError, ValueError):
    """An op was called with an argument it cannot take."""

    def __init__(self, op: str, argument: str, must: str, got: object, fix: str = "") -> None:
        super().__init__(f"{op}: {argument} must {must}, got {got}.{' ' + fix if fix else ''}")


class UnsupportedError(SparseAttnError, NotImplementedError):
    """No provider can serve this call exactly; the message lists every provider's reasons."""


class GradientError(SparseAttnError, NotImplementedError):
    """A gradient was asked of an op, or of a provider, that has none."""


class PolicyError(SparseAttnError, ValueError):
    """A policy, a rule or an option is not valid."""


class RequirementError(SparseAttnError, RuntimeError):
    """A rule with mode="require" matched a site that its backend cannot serve."""


class ParallelError(SparseAttnError, ValueError):
    """Attention cannot be computed over shards of its sequence as asked."""


class SelfCheckError(SparseAttnError, RuntimeError):
    """A rewritten layer was too far from dense attention, under the option on_failure="raise"."""


class RegistrationError(SparseAttnError, ValueError):
    """A backend was registered wrongly, or twice under one name."""


class MissingPackageError(SparseAttnError, ImportError):
    """An optional package is needed and not installed; the message names the extra that brings it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean "x"? Known: x, y.`, to put at the end of a message about an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f'Did you mean "{close[0]}"? ' if close else ""
    return f"{hint}Known: {', '.join(names) or 'none'}."
