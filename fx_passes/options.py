"""Options of `torch.compile(..., backend="sparseattn", mode=..., options=...)`: ours, then Inductor's.

An unknown name is refused here with the nearest known one, before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..attn_ops.capability import Capability
from ..attn_ops.errors import PolicyError, nearest

INDUCTOR = "inductor"
_OURS = ("policy", "inner_backend", "capability", "hoist_tiling", "mode")


@dataclass(frozen=True)
class Options:
    """What the user asked of the backend.

    Args:
        policy: a preset name, a path, a dict, a Policy, or None.
        inner_backend: the backend that compiles the rewritten graph.
        capability: the machine to decide for, or None for the one each tensor is on.
        hoist_tiling: keep tokens in tile order between sites, where that is exact.
        inductor: Inductor configuration, with that of `mode` filled in.
    """

    policy: Any = None
    inner_backend: str = INDUCTOR
    capability: Capability | None = None
    hoist_tiling: bool = True
    inductor: dict[str, Any] = field(default_factory=dict)

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
        mode = given.pop("mode", mode)
        if not isinstance(hoist, bool):
            raise PolicyError(f"options: hoist_tiling must be true or false, got {hoist!r}.")
        if inner != INDUCTOR:
            _check_inner(inner, mode, given)
            return cls(policy, inner, _capability(capability), hoist)
        return cls(policy, inner, _capability(capability), hoist, {**_mode_options(mode), **_inductor_options(given)})


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
