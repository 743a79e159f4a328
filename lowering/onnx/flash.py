"""flash_attention: the operator Attention where nothing else is asked, from opset 23 on."""

from __future__ import annotations

from typing import Any

from .dense import attend_all
from .graph import Graph, Value

_ATTENTION_SINCE = 23


def flash_attention(
    graph: Graph, given: dict[str, Value], *, causal: bool, window: int | None, scale: float, lse: bool, **_: Any
) -> tuple[Value, Value | None]:
    """Body of `flash_attention`."""
    q, k, v = given["q"], given["k"], given["v"]
    if window is None and not lse and graph.opset >= _ATTENTION_SINCE:
        return graph.op("Attention", q, k, v, is_causal=int(causal), scale=scale), None
    return attend_all(q, k, v, causal=causal, scale=scale, window=window)
