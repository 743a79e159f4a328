"""A Wan block with INT8 attention: q and k quantized inside the op, or in the graph, fused with norm and rotary.

What Inductor generates and what one call runs, and the time of one block of diffusers' Wan with random weights.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparseattn

from harness.case import Case
from harness.clock import interleaved
from harness.error import distance
from harness.rates import DTYPES
from harness.record import Row
from suites.cpu.threads import threads

NAME = "fused_prologue"
VARIANTS: dict[str, bool | None] = {"dense": None, "one op": False, "fused": True}
"""Whether the quantization is fused into the graph; None is PyTorch's own attention."""


@dataclass(frozen=True)
class Settings:
    """Sizes; of dtype and tokens every combination is measured."""

    tokens: tuple[int, ...] = (256, 1024, 2048)
    dtype: tuple[str, ...] = ("fp32", "bf16")
    heads: int = 4
    dim: int = 128
    granularity: str = "per_thread"
    threads: int = 1
    repeats: int = 15


def run(settings: Settings) -> Iterator[Row]:
    """A row for every variant, dtype and number of tokens."""
    for dtype, tokens in itertools.product(settings.dtype, settings.tokens):
        with threads(settings.threads), torch.no_grad():
            yield from measure(settings, dtype, tokens)


def measure(settings: Settings, dtype: str, tokens: int) -> Iterator[Row]:
    """The rows of one block; the error is that of its output, to the block with dense attention."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = wan_block(settings.heads, settings.dim, DTYPES[dtype])
    inputs = inputs_of(tokens, DTYPES[dtype])
    calls: dict[str, Callable[[], Tensor]] = {}
    made: dict[str, tuple[Tensor, int, int]] = {}
    for name, fuse in VARIANTS.items():
        block = compiled(model, fuse, settings.granularity)
        calls[name] = lambda block=block: block(**inputs)[0]
        made[name] = generated(calls[name])
    times = interleaved(calls, settings.repeats)
    setting = {"seq": tokens, "heads": settings.heads, "dim": settings.dim, "dtype": dtype, "threads": settings.threads}
    for name, (out, kernels, buffers) in made.items():
        yield Row(
            NAME,
            name,
            setting,
            time=times[name],
            dense=times["dense"],
            error={} if name == "dense" else distance(out, made["dense"][0], to="dense"),
            figures={"kernels": kernels, "buffers": buffers, "operators": operators_of(calls[name])},
        )


def wan_block(heads: int, dim: int, dtype: torch.dtype) -> torch.nn.Module:
    """A Wan transformer of one block."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        *((1, 2, 2), heads, dim),
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4 * heads * dim,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    return model.to(dtype).eval()


def inputs_of(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Latents of 4 frames that become so many tokens, and a text of 32."""
    height, width = 16, tokens // 4 // 8 * 2
    return {
        "hidden_states": torch.randn(1, 4, 4, height, width).to(dtype),
        "encoder_hidden_states": torch.randn(1, 32, 64).to(dtype),
        "timestep": torch.tensor([1]),
        "return_dict": False,
    }


def compiled(model: torch.nn.Module, fuse: bool | None, granularity: str) -> Callable[..., Any]:
    """The model with its self-attention quantized, or as it is."""
    if fuse is None:
        return torch.compile(model, dynamic=False)
    rule = sparseattn.Rule("sage", modules="blocks.*.attn1", mode="require", params={"granularity": granularity})
    options = {"policy": sparseattn.Policy([rule]), "fused_prologue": fuse}
    return torch.compile(model, backend="sparseattn", dynamic=False, options=options)


def generated(call: Callable[[], Tensor]) -> tuple[Tensor, int, int]:
    """The result of a first call, and how many kernels and buffers the code has that Inductor makes for it."""
    from torch._inductor.utils import run_and_get_code

    with torch.compiler.config.patch(force_disable_caches=True):
        result, codes = run_and_get_code(call)
    body = "\n".join(code[code.index("def call(") :] for code in codes)
    return result, len(re.findall(r"\bcpp_fused_\w+\(", body)), body.count("= empty_strided")


def operators_of(call: Callable[[], object]) -> int:
    """How many of PyTorch's operators a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.name.startswith("aten::") for event in profile.events())


def _why_not() -> str:
    return "" if importlib.util.find_spec("diffusers") else "needs diffusers: pip install diffusers"


CASE = Case(NAME, run, Settings(), Settings((256,), ("fp32",), 1, 32, repeats=1), _why_not)
