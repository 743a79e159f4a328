"""Where the policy comes from, highest first.

1. the environment variable SPARSEATTN_DISABLE (1 or true): no policy, every site stays dense;
2. `with use_policy(...)` around the call that compiles;
3. the environment variable SPARSEATTN_POLICY: a preset or a path;
4. the option `policy` of torch.compile;
5. the preset "auto".
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator
from contextvars import ContextVar

from ..attn_ops.errors import PolicyError
from .policy import Policy, PolicySource

DISABLE = "SPARSEATTN_DISABLE"
POLICY = "SPARSEATTN_POLICY"
DEFAULT = "auto"

_SWITCH = {"1": True, "true": True, "0": False, "false": False, "": False}
_current: ContextVar[Policy | None] = ContextVar("sparseattn_policy", default=None)


@contextlib.contextmanager
def use_policy(policy: PolicySource) -> Iterator[Policy]:
    """Use a policy for what is compiled inside the block, in this thread or task; nests, and may decorate a function.

    Put it around the call of a compiled model, not inside the model.

    Args:
        policy: a Policy, a table, a path or the name of a preset; see `Policy.load`.

    Raises:
        PolicyError: on entry, if it is not valid.
    """
    loaded = Policy.load(policy)
    token = _current.set(loaded)
    try:
        yield loaded
    finally:
        _current.reset(token)


def effective_policy(option: PolicySource | None = None) -> Policy | None:
    """The policy in force, or None if SPARSEATTN_DISABLE switches all of them off.

    Args:
        option: the option `policy` of torch.compile, if one was given.

    Raises:
        PolicyError: if the policy in force, or an environment variable, is not valid.
    """
    if _disabled():
        return None
    current = _current.get()
    if current is not None:
        return current
    if named := os.environ.get(POLICY):
        try:
            return Policy.load(named)
        except PolicyError as error:
            raise PolicyError(f"{POLICY}={named}: {error}") from None
    return Policy.load(DEFAULT if option is None else option)


def policy_state() -> Hashable:
    """A key of everything but the option that `effective_policy` depends on. Cheap enough to be asked on every call.

    It holds the path of a policy file, not its content: a file is read again when something is compiled.
    """
    return _current.get(), os.environ.get(POLICY), os.environ.get(DISABLE)


def _disabled() -> bool:
    given = os.environ.get(DISABLE, "")
    if given.lower() not in _SWITCH:
        raise PolicyError(f"{DISABLE} must be 1, true, 0 or false, got {given!r}. Unset it, or set it to one of these.")
    return _SWITCH[given.lower()]
