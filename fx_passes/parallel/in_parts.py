"""IN_PARTS: the methods that can attend to one part of the keys after another, as a ring asks for, by backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .ring import Method, Part, Ring, Runs, cut
from .ring_sparse import BlockTopK


def _exact(arguments: Mapping[str, Any]) -> Method:
    """Dense attention: the kernel that gives lse."""
    scale, provider = arguments.get("scale"), arguments.get("provider") or "auto"

    def attend(q: Tensor, k: Tensor, v: Tensor, queries: Runs, keys: Runs, causal: bool) -> list[Part]:
        if causal:  # as many keys as queries: none of these sees the padding after them
            keys = [run.padded for run in keys]
        q, k, v = cut([run.padded for run in queries], q), cut(keys, k), cut(keys, v)
        part: Part = torch.ops.sparseattn.flash_attention(q, k, v, causal=causal, scale=scale, provider=provider)
        return [part]

    def method(_ring: Ring, _q: Tensor, _k: Tensor) -> tuple[Any, None]:
        return attend, None

    return method


def _block_topk(arguments: Mapping[str, Any]) -> Method:
    return BlockTopK(
        keep_ratio=arguments["keep_ratio"],
        keep_ratios=arguments.get("keep_ratios"),
        block_q=arguments["block_q"],
        block_k=arguments["block_k"],
        scale=arguments.get("scale"),
        provider=arguments["provider"],
    )


IN_PARTS: dict[str | None, Callable[[Mapping[str, Any]], Method]] = {
    None: _exact,
    "flash": _exact,
    "block_topk": _block_topk,
}
"""Backend, None for dense attention -> what makes its method of the arguments of its op."""
