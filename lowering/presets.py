"""The four presets, from exact to fast, and the numbers they are made of.

Only `balanced` and `fast` name a sparse backend: nothing is dropped without being asked.
"""

from __future__ import annotations

import functools

from ..attn_ops.errors import PolicyError, nearest
from .policy import Policy
from .rule import Rule

QUANTIZED_MIN_SEQ = 1024
"""Tokens below which `auto` does not quantize."""
SPARSE_MIN_SEQ = 1024
"""Tokens below which `balanced` and `fast` drop no key blocks."""
KEEP_RATIO = {"balanced": 0.5, "fast": 0.3}
"""Fraction of the key blocks that each query block keeps."""

PRESETS = ("exact", "auto", "balanced", "fast")


@functools.cache
def preset(name: str) -> Policy:
    """The preset of that name; the same object on every call.

    Raises:
        PolicyError: if there is none; the message names the nearest.
    """
    if name not in PRESETS:
        raise PolicyError(
            f"policy: unknown preset {name!r}. {nearest(name, PRESETS)} A policy file ends in .toml or .json."
        )
    if name == "exact":
        return Policy(_exact(), name)
    sparse = [_sparse(KEEP_RATIO[name])] if name in KEEP_RATIO else []
    return Policy([*sparse, _quantized(), *_exact()], name)


def _exact() -> list[Rule]:
    return [Rule("flash", why="exact attention, best kernel")]


def _quantized() -> Rule:
    return Rule(
        ("sage", "flash"),
        min_seq=QUANTIZED_MIN_SEQ,
        only_if_faster=True,
        why="quantized where it pays, else exact",
    )


def _sparse(keep_ratio: float) -> Rule:
    return Rule(
        ("block_topk", "sage", "flash"),
        kind="self",
        min_seq=SPARSE_MIN_SEQ,
        only_if_faster=True,
        params={"keep_ratio": keep_ratio},
        why="sparse where it pays, else quantized, else exact",
    )
