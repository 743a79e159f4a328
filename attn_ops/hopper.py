"""What our kernels for Hopper, and copies by descriptor, need, for their providers. Nothing here imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .call import AttentionCall
from .capability import Capability
from .spec import TRITON, Kernel, Provider, WhyNot, no_reasons

_HEAD_DIMS = (64, 128)
_KEYS = 64
_COPY_ENGINES = (90, 100, 103)
_COPIED_KEYS = 16
UNMEASURED = "its speed is not measured yet: chosen only where it is named"
_SCHEDULES = {
    "gluon": ("attention", "Hopper kernel, four programs on a multiprocessor"),
    "gluon_overlapped": ("overlapped_attention", "Hopper kernel, the next scores computed during a softmax"),
}
SUPPORT = replace(TRITON, dtypes=(torch.float16, torch.bfloat16))


def providers(
    load: Callable[[str], Callable[[], Kernel]],
    load_backward: Callable[[], Kernel] | None = None,
    why_not: WhyNot = no_reasons,
) -> tuple[Provider, ...]:
    """One for each schedule of the forward kernels in Gluon.

    Args:
        load: from the name of the function in the module, its loader.
        load_backward: the loader of the backward kernel, or None.
        why_not: requirements beyond those of every Gluon kernel.
    """

    def reasons(call: AttentionCall, capability: Capability) -> list[str]:
        return [*why_not_tiles(call, capability), *why_not(call, capability)]

    return tuple(
        Provider(
            *(name, summary, load(function), load_backward),
            support=replace(SUPPORT, causal=False, grad=load_backward is not None),
            why_not=reasons,
            only_if_named=UNMEASURED,
        )
        for name, (function, summary) in _SCHEDULES.items()
    )


def why_not_tiles(call: AttentionCall, capability: Capability) -> list[str]:
    """The `why_not` of a kernel for sm_90 with tiles of 64 tokens."""
    block_q, block_k = call.param("block_q"), call.param("block_k")
    checks = (
        (capability.sm not in (None, 90), f"its kernel is for sm90, this is {capability}"),
        (call.head_dim not in _HEAD_DIMS, f"head_dim {call.head_dim}, not {' or '.join(map(str, _HEAD_DIMS))}"),
        (
            isinstance(block_q, int) and block_q % _KEYS != 0,
            f"blocks of {block_q} queries, it has multiples of {_KEYS}",
        ),
        (isinstance(block_k, int) and block_k != _KEYS, f"blocks of {block_k} keys, it has {_KEYS}"),
    )
    return [sentence for wrong, sentence in checks if wrong]


def why_not_descriptors(call: AttentionCall, capability: Capability) -> list[str]:
    """The `why_not` of a kernel that copies tiles of keys: they may not reach over the end of a block."""
    block_k = call.param("block_k")
    checks = (
        (capability.sm not in (None, *_COPY_ENGINES), f"it copies on sm90, sm100 and sm103, this is {capability}"),
        (
            isinstance(block_k, int) and block_k % _COPIED_KEYS != 0,
            f"blocks of {block_k} keys, it has multiples of {_COPIED_KEYS}",
        ),
    )
    return [sentence for wrong, sentence in checks if wrong]
