"""One layer of norm, rotary embedding and INT8 or INT4 attention: its quantization in the graph, or in the one op."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparseattn

from harness.case import Case
from harness.clock import interleaved
from harness.rates import DTYPES
from harness.record import Row
from suites.cpu.threads import threads

NAME = "prologue_layer"
QUANTIZED: dict[str, dict[str, Any]] = {"8 bits": {}, "4 bits": {"bits": 4}, "8 bits, pv fp8": {"pv": "fp8"}}
"""The parameters of sage that are compared."""


@dataclass(frozen=True)
class Settings:
    """Sizes; every combination of dtype and tokens is measured."""

    tokens: tuple[int, ...] = (512, 1024, 2048)
    dtype: tuple[str, ...] = ("fp32", "bf16")
    heads: int = 4
    dim: int = 128
    threads: int = 1
    repeats: int = 15


class Layer(nn.Module):
    """RMSNorm and a rotary embedding of q and k: (1, H, S, D), then attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_q, self.norm_k = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, angle: Tensor) -> Tensor:
        """Self-attention; `angle` is (S, D / 2)."""
        q, k = (_rotated(norm(x), angle) for norm, x in ((self.norm_q, q), (self.norm_k, k)))
        return scaled_dot_product_attention(q, k, v)


def run(settings: Settings) -> Iterator[Row]:
    """Two rows, "one op" and "fused", for every quantization, dtype and number of tokens."""
    for dtype, tokens, name in itertools.product(settings.dtype, settings.tokens, QUANTIZED):
        with threads(settings.threads), torch.no_grad():
            yield from _measure(settings, dtype, tokens, name)


def _measure(settings: Settings, dtype: str, tokens: int, name: str) -> Iterator[Row]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = Layer(settings.dim).to(DTYPES[dtype]).eval()
    # Tokens before heads in memory, as a projection leaves them.
    qkv = [torch.randn(1, tokens, settings.heads, settings.dim).to(DTYPES[dtype]).transpose(1, 2) for _ in range(3)]
    angle = torch.randn(tokens, settings.dim // 2)
    policy = sparseattn.Policy([sparseattn.Rule("sage", mode="require", params=QUANTIZED[name])])
    calls = {
        way: _compiled(layer, policy, fuse, (*qkv, angle)) for way, fuse in (("one op", False), ("fused", True))
    } | {"dense": _dense(layer, (*qkv, angle))}
    times = interleaved(calls, settings.repeats)
    sizes = {"seq": tokens, "heads": settings.heads, "dim": settings.dim, "dtype": dtype, "threads": settings.threads}
    for way in ("one op", "fused"):
        yield Row(NAME, way, {"quantized": name, **sizes}, time=times[way], dense=times["dense"])


def _compiled(layer: Layer, policy: sparseattn.Policy, fuse: bool, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    options = {"policy": policy, "fused_prologue": fuse}
    made = torch.compile(layer, backend="sparseattn", fullgraph=True, dynamic=False, options=options)
    return lambda: made(*inputs)


def _dense(layer: Layer, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    made = torch.compile(layer, fullgraph=True, dynamic=False)
    return lambda: made(*inputs)


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    turned = torch.cat([low * angle.cos() - high * angle.sin(), low * angle.sin() + high * angle.cos()], -1)
    return turned.type_as(x)


CASE = Case(NAME, run, Settings(), Settings((64,), ("fp32",), 1, 32, repeats=1))
