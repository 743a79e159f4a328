"""block_sparse_attention: the lists are given, and gathered up to the longest of any head."""

from __future__ import annotations

from typing import Any

from .attend import Lists, attend
from .graph import Graph, Value


def block_sparse_attention(
    _graph: Graph, given: dict[str, Value], *, block_q: int, block_k: int, causal: bool, scale: float, **_: Any
) -> tuple[Value, Value]:
    """Body of `block_sparse_attention`."""
    sizes = given.get("key_sizes")
    lists = Lists(given["block_index"], given["block_count"], block_q, block_k, sizes, causal)
    return attend(given["q"], given["k"], given["v"], lists, scale=scale)
