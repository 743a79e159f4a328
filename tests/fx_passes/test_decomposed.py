"""join_decomposed and join_device_sdpa: what run_decompositions leaves of SDPA is found again, or left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.graphs import count, exported, listing
from torch import Tensor, nn
from torch.nn import functional

from sparseattn.fx_passes.normalize import join_decomposed, join_device_sdpa
from sparseattn.fx_passes.sites import read_site

SDPA = torch.ops.aten.scaled_dot_product_attention.default
CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BATCH, LENGTH = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)


class Attention(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.arguments)


def qkv(dtype: torch.dtype = torch.float32, kv_heads: int = 4) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, heads, 40, 32).to(dtype) for heads in (4, kv_heads, kv_heads))


CASES: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], str]] = {
    "plain": ({}, qkv(), "self (2,4,40,32), float32, cpu"),
    "causal": ({"is_causal": True}, qkv(), "self (2,4,40,32), float32, cpu, causal"),
    "scale": ({"scale": 0.3}, qkv(), "self (2,4,40,32), float32, cpu, scale 0.3"),
    "scale of one": ({"scale": 1.0}, qkv(), "self (2,4,40,32), float32, cpu, scale 1"),
    "gqa": ({"enable_gqa": True}, qkv(kv_heads=2), "self (2,4/2,40,32), float32, cpu"),
    "bf16 causal": ({"is_causal": True}, qkv(torch.bfloat16), "self (2,4,40,32), bfloat16, cpu, causal"),
    "bool mask": ({}, (*qkv(), torch.ones(40, 40).tril().bool()), "self (2,4,40,32), float32, cpu, float mask"),
    "float mask": ({}, (*qkv(), torch.randn(2, 1, 40, 40)), "self (2,4,40,32), float32, cpu, float mask"),
}
EVERY = pytest.mark.parametrize("name", CASES)


def decomposed(name: str, dynamic: bool = False) -> tuple[torch.export.ExportedProgram, tuple[Tensor, ...]]:
    arguments, given, _ = CASES[name]
    shapes = tuple({0: BATCH, 2: LENGTH} for _ in given) if dynamic else None
    program = exported(Attention(**arguments), *given, dynamic_shapes=shapes)
    return program.run_decompositions(), given


@EVERY
def test_joins(name: str) -> None:
    program, given = decomposed(name)
    before = program.module()(*given)
    (record,) = join_decomposed(program.graph_module)
    assert str(read_site(record.site).call) == CASES[name][2]
    record.commit()
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    assert count(program.graph_module, SDPA) == 1
    assert count(program.graph_module, torch.ops.aten.bmm.default, torch.ops.aten._softmax.default) == 0
    close = {"rtol": 2e-2, "atol": 2e-2} if before.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(program.module()(*given), before, **close)


@pytest.mark.parametrize("name", ["plain", "causal", "bf16 causal"])
def test_joins_at_symbolic_sizes(name: str) -> None:
    program, _ = decomposed(name, dynamic=True)
    (record,) = join_decomposed(program.graph_module)
    assert str(read_site(record.site).call) == CASES[name][2].replace("(2,4,40,", "(~2,4,~40,")


@EVERY
def test_restores_every_node(name: str) -> None:
    program, _ = decomposed(name)
    before = listing(program.graph_module)
    for record in join_decomposed(program.graph_module):
        record.restore()
    assert listing(program.graph_module) == before


@EVERY
def test_is_idempotent(name: str) -> None:
    program, _ = decomposed(name)
    for record in join_decomposed(program.graph_module):
        record.commit()
    assert join_decomposed(program.graph_module) == []


class Probabilities(nn.Module):
    """The weights are a result too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)
        return p @ v, p


class OtherAxis(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-2) @ v


class NegativeScale(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.mark.parametrize(
    "model", [Probabilities(), OtherAxis(), NegativeScale()], ids=lambda model: type(model).__name__
)
def test_leaves_alone(model: nn.Module) -> None:
    program = exported(model, *qkv()).run_decompositions()
    before = listing(program.graph_module)
    assert join_decomposed(program.graph_module) == []
    assert listing(program.graph_module) == before


def with_cpu_flash(name: str) -> torch.export.ExportedProgram:
    """The program with SDPA opened, and the kernel of the device that it calls not."""
    arguments, given, _ = CASES[name]
    table = torch.export.default_decompositions()
    table.pop(CPU_FLASH)
    return exported(Attention(**arguments), *given).run_decompositions(table)


@pytest.mark.parametrize("name", ["plain", "causal", "scale", "bf16 causal", "float mask"])
def test_joins_the_kernel_of_a_device(name: str) -> None:
    program = with_cpu_flash(name)
    assert count(program.graph_module, CPU_FLASH) == 1
    before = program.module()(*CASES[name][1])
    (record,) = join_device_sdpa(program.graph_module)
    assert str(read_site(record.site).call) == CASES[name][2]
    listed = listing(program.graph_module)
    record.commit()
    program.graph_module.recompile()
    assert listed != listing(program.graph_module)
    assert count(program.graph_module, CPU_FLASH) == 0
    torch.testing.assert_close(program.module()(*CASES[name][1]), before, rtol=0, atol=0)


def test_a_kernel_whose_logsumexp_is_read_stays() -> None:
    class Both(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return CPU_FLASH(q, k, v)

    assert join_device_sdpa(exported(Both(), *qkv()).graph_module) == []
