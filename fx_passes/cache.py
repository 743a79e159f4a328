"""Keep the compile caches honest.

Inductor's and AOTAutograd's caches hash the rewritten graph, so the policy is in their key by itself. Two things are
not: the code behind our ops, which we add as a tag, and what Dynamo keeps in memory, which must not outlive a change of
policy made outside the compile options (`use_policy`, environment), which we guard on.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx

from ..lowering.policy import Policy
from ..lowering.precedence import policy_state
from ..lowering.steps import current_step

_log = logging.getLogger(__name__)
_SOURCES = (".py", ".cpp", ".h")


@functools.cache
def code_tag() -> str:
    """Hash of the sources of this package."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("attn_ops", "lowering", "fx_passes"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in _SOURCES:
                digest.update(file.read_bytes())
    return f"sparseattn-{digest.hexdigest()[:16]}"


def compile_with_inductor(
    module: fx.GraphModule, example_inputs: Sequence[Any], config_patches: dict[str, Any]
) -> Callable[..., Any]:
    """Inductor's compile_fx with our code in its cache key, for the forward and for the backward (compiled later)."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch.compiler import config

    tag = f"{config.cache_key_tag}|{code_tag()}"

    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        with config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return compile_fx_inner(*args, **kwargs)

    with config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled = compile_fx(module, list(example_inputs), compile_inner, config_patches)
    return cast(Callable[..., Any], compiled)


def guard_on_policy_state(policy: Policy | None) -> None:
    """Have Dynamo recompile the frame being compiled where its decisions may be others.

    That is when `use_policy` or the environment changes the policy, and at steps that other rules of `policy` cover.
    """
    compiled_under = _state(policy)
    guard_on(lambda: _state(policy) == compiled_under, "sparseattn policy unchanged")


def guard_on(holds: Callable[[], bool], told: str) -> bool:
    """Have Dynamo recompile the frame being compiled once `holds()` is false; `told` is what it logs.

    Returns:
        Whether it will: not where the backend is called without Dynamo, nor where this torch has no such guard.
    """
    if torch._guards.TracingContext.try_get() is None:
        return False
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    try:
        install_guard(GlobalStateSource().make_guard(functools.partial(_build_guard, holds, told)))
    except (AttributeError, TypeError):
        _warn_once()
        return False
    return True


def _state(policy: Policy | None) -> Hashable:
    return policy_state(), policy and policy.in_force(current_step())


def _build_guard(holds: Callable[[], bool], told: str, builder: Any, _guard: Any) -> None:
    def check(_scope: object) -> bool:
        return holds()

    root = builder.guard_manager.root
    try:
        root.add_lambda_guard(check, [told], None)
    except TypeError:  # torch < 2.13 has no third argument
        root.add_lambda_guard(check, [told])


@functools.cache
def _warn_once() -> None:
    _log.warning(
        "torch %s has no guard hook we know: call torch._dynamo.reset() after use_policy or the environment changes.",
        torch.__version__,
    )
