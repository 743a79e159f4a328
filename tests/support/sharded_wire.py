"""What it costs to round queries and keys on their way: distances to dense attention and to the method on one rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.sharded_cases import compiled, mesh_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import scaled_dot_product_attention

from sparseattn import parallel
from sparseattn.fx_passes.parallel import int8_wire

SHAPE = (1, 4, 1024, 128)
QKV = tuple[Tensor, Tensor, Tensor]


class Attention(nn.Module):
    """Attention to q, k, v: (B, H, S, D), which the ranks of a mesh share if there is one."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.mesh is None:
            return scaled_dot_product_attention(q, k, v)
        shards = [parallel.shard(tensor, self.mesh, dim=2) for tensor in (q, k, v)]
        return parallel.gather(scaled_dot_product_attention(*shards), self.mesh, dim=2, tokens=q.shape[2])


def shifted() -> QKV:
    """Standard normal, but that one channel is far from 0 in all keys; 61 tokens, which no number of ranks divides."""
    q, k, v = torch.randn(3, 1, 4, 61, 32).unbind()
    return q, k + 40 * (torch.arange(32) == 3), v


def normal() -> QKV:
    """Standard normal."""
    q, k, v = torch.randn(3, *SHAPE).unbind()
    return q, k, v


def structured() -> QKV:
    """Inputs with what trained models have: those of the benchmark of all roundings."""
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from suites.cpu import quantization

    made: QKV = quantization.structured(SHAPE)
    return made


def distances(
    rank: int, ranks: int, *, make: Callable[[], QKV], method: str = "sage", **params: Any
) -> dict[str, dict[str, float]]:
    """How far the method is from fp64 dense attention on one rank, and on all with q and k rounded on the way."""
    qkv, mesh = make(), mesh_of(ranks)
    policy = {"name": method, "rules": [{"use": method, "mode": "require", "params": params}]}
    int8 = parallel.ContextParallel(mesh, wire="int8")
    dense = scaled_dot_product_attention(*(tensor.double() for tensor in qkv))
    with torch.no_grad():
        alone = compiled(Attention(None), None, policy)(*qkv)
        sent = compiled(Attention(mesh), mesh, policy, parallel=int8)(*qkv)
        torch._dynamo.reset()
        with mock.patch.object(int8_wire, "without_mean", _without_zero):
            as_it_is = compiled(Attention(mesh), mesh, policy, parallel=int8)(*qkv)
    return {
        "one rank": _apart(alone, dense),
        "int8": _apart(sent, dense),
        "int8, k with its mean": _apart(as_it_is, dense),
        "int8 to one rank": _apart(sent, alone),
    }


def _without_zero(k: Tensor) -> tuple[Tensor, Tensor]:
    return k.float(), torch.zeros_like(k[:, :, :1]).float()


def _apart(ours: Tensor, truth: Tensor) -> dict[str, float]:
    wrong = ours.double() - truth.double()
    return {"L1": float(wrong.abs().sum() / truth.abs().sum()), "L2": float(wrong.norm() / truth.norm())}


CASES = {"shifted": partial(distances, make=shifted)}
TABLE = {
    "sage, normal": partial(distances, make=normal),
    "sage, structured": partial(distances, make=structured),
    "sparge, structured": partial(distances, make=structured, method="sparge", keep_ratio=0.5),
}
