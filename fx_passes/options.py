"""Options of `torch.compile(..., backend="sparseattn", mode=..., options=...)`: ours, then Inductor's.

An unknown name is refused here with the nearest known one, before anything is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..attn_ops.capability import Capability
from ..attn_ops.errors import PolicyError, nearest
from ..lowering.context_parallel import ContextParallel

INDUCTOR = "inductor"
OnFailure = Literal["report", "demote", "raise"]
_OURS = (
    *("policy", "inner_backend", "capability", "hoist_tiling", "fused_prologue", "parallel"),
    *("mode", "check", "on_failure", "check_limit"),
)


@dataclass(frozen=True)
class CheckOptions:
    """How the rewritten sites are compared with dense attention.

    Args:
        every: compare the first run of a graph and every so many; None for the first alone.
        on_failure: what happens to a layer that is too far: it is reported, made dense, or an error.
        limit: largest relative L1 of a site; None for that of its backend.
    """

    every: int | None = None
    on_failure: OnFailure = "report"
    limit: float | None = None

    @classmethod
    def parse(cls, given: dict[str, Any]) -> CheckOptions | None:
        """Take `check`, `on_failure` and `check_limit` out of the options; None without a check.

        Raises:
            PolicyError: on a wrong value, or one of the others without `check`.
        """
        rest = {name: given.pop(name) for name in ("on_failure", "check_limit") if name in given}
        if (check := given.pop("check", None)) is None:
            if rest:
                raise PolicyError(f'options: {" and ".join(rest)} must come with check. Add "check": "first".')
            return None
        on_failure, limit = rest.get("on_failure", "report"), rest.get("check_limit")
        if check != "first" and not (type(check) is int and check > 0):
            raise PolicyError(f'options: check must be "first" or a number of runs, at least 1, got {check!r}.')
        if on_failure not in get_args(OnFailure):
            names = " or ".join(f'"{name}"' for name in get_args(OnFailure))
            raise PolicyError(f"options: on_failure must be {names}, got {on_failure!r}.")
        if limit is not None and not (type(limit) in (int, float) and 0 < limit < math.inf):
            raise PolicyError(f"options: check_limit must be a positive number, a relative L1, got {limit!r}.")
        return cls(None if check == "first" else check, on_failure, limit)


@dataclass(frozen=True)
class Options:
    """What the user asked of the backend.

    Args:
        policy: a preset name, a path, a dict, a Policy, or None.
        inner_backend: the backend that compiles the rewritten graph.
        capability: the machine to decide for, or None for the one each tensor is on.
        hoist_tiling: keep tokens in tile order between sites, where that is exact.
        fused_prologue: quantize in the graph: wherever it is possible, nowhere, or (None) where it was measured to pay.
        check: how the rewritten sites are compared with dense attention; None if they are not.
        inductor: Inductor configuration, with that of `mode` filled in.
        parallel: how the sequence is shared with other ranks, or None.
    """

    policy: Any = None
    inner_backend: str = INDUCTOR
    capability: Capability | None = None
    hoist_tiling: bool = True
    fused_prologue: bool | None = None
    check: CheckOptions | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    parallel: ContextParallel | None = None

    @classmethod
    def parse(cls, mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """Read `mode` and `options` as torch.compile passes them; `mode` may also be an option.

        Raises:
            PolicyError: on an unknown option or mode, or an Inductor option for another inner backend.
        """
        given = dict(options or {})
        inner = given.pop("inner_backend", INDUCTOR)
        capability = given.pop("capability", None)
        policy = given.pop("policy", None)
        hoist = given.pop("hoist_tiling", True)
        fuse = given.pop("fused_prologue", None)
        parallel = given.pop("parallel", None)
        mode = given.pop("mode", mode)
        check = CheckOptions.parse(given)
        if not isinstance(hoist, bool):
            raise PolicyError(f"options: hoist_tiling must be true or false, got {hoist!r}.")
        if not isinstance(fuse, bool | None):
            raise PolicyError(f"options: fused_prologue must be true, false or left out, got {fuse!r}.")
        if not isinstance(parallel, ContextParallel | None):
            raise PolicyError(f"options: parallel must be a sparseattn.parallel.ContextParallel, got {parallel!r}.")
        if inner != INDUCTOR:
            _check_inner(inner, mode, given)
            return cls(policy, inner, _capability(capability), hoist, fuse, check, parallel=parallel)
        inductor = {**_mode_options(mode), **_inductor_options(given)}
        return cls(policy, inner, _capability(capability), hoist, fuse, check, inductor, parallel)


def _capability(given: str | Capability | None) -> Capability | None:
    return Capability.of(given) if isinstance(given, str) else given


def _check_inner(inner: object, mode: str | None, rest: Mapping[str, Any]) -> None:
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=None)
    if not isinstance(inner, str) or inner not in known or inner == "sparseattn":
        names = [name for name in known if name != "sparseattn"]
        raise PolicyError(f"options: unknown inner_backend {inner!r}. {nearest(str(inner), names)}")
    if mode is not None or rest:
        extra = ", ".join(sorted([*rest, *(["mode"] if mode is not None else [])]))
        raise PolicyError(f'options: {extra} can be given only with inner_backend="inductor", got {inner!r}.')


def _mode_options(mode: str | None) -> dict[str, Any]:
    import torch._inductor

    if mode is None:
        return {}
    known: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode not in known:
        raise PolicyError(f"mode: unknown mode {mode!r}. {nearest(mode, known)}")
    return dict(known[mode])


def _inductor_options(given: dict[str, Any]) -> dict[str, Any]:
    import torch._inductor.config as config

    known = config.get_config_copy()
    for name in given:
        if name.replace("-", "_") not in known:
            close = nearest(name, [*_OURS, *known]).split(" Known: ")[0]
            raise PolicyError(f"options: unknown option {name!r}. {close} Ours are {', '.join(_OURS)}.")
    return {name.replace("-", "_"): value for name, value in given.items()}
