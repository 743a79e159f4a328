"""Quantization fused into the graph, beside quantization in the op."""

from __future__ import annotations

import functools

from .markdown import count, fixed, milliseconds, span, table
from .registry import Results, view

_QUANTIZED = {"int8": "8 bits", "int4": "4 bits", "fp8": "8 bits, pv fp8"}


@view("fused_prologue")
def fused_prologue(results: Results) -> str:
    """A Wan block with its quantization in the op or in the graph."""
    rows = results.rows("fused_prologue")
    header = (
        "attention",
        "dtype",
        "tokens",
        "kernels",
        "buffers",
        "operators",
        "ms (quartiles)",
        "times dense",
        "rel. L1",
    )
    lines = (
        (
            row.name,
            *(count(row.setting[name]) for name in ("dtype", "seq")),
            *(str(row.figures[name]) for name in ("kernels", "buffers", "operators")),
            milliseconds(row.time),
            fixed(row.speed, 2),
            fixed(row.error.get("relative_l1"), 4),
        )
        for row in rows
    )
    return table(header, lines, rows, words=2)


def _layer(quantized: str, dtype: str, results: Results) -> str:
    """The time of a layer with its quantization fused, in times that with it in the op, over the lengths."""
    one, fused = (
        results.rows("prologue_layer", name, quantized=quantized, dtype=dtype) for name in ("one op", "fused")
    )
    return span((b.time.ms / a.time.ms for a, b in zip(one, fused, strict=True)), 2)


for _key, _quantized in _QUANTIZED.items():
    for _dtype in ("fp32", "bf16"):
        view(f"prologue_layer.{_key}.{_dtype}")(functools.partial(_layer, _quantized, _dtype))
