"""What else one rank does in the tests of context parallelism: bytes, graphs, recompilations, regions, failures."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from support import sharded_wire
from support.attention_model import Blocks
from support.sharded_cases import FEW, compare, compiled, distance, mesh_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import sparseattn
from sparseattn import parallel

HEADS, CHANNELS = 4, 64


class Shared(nn.Module):
    """Blocks of attention on the shards of its input, in checkpoints if asked."""

    def __init__(self, mesh: DeviceMesh | None, *, regions: bool = False, layers: int = 2, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = Blocks(layers=layers, heads=HEADS, **arguments)
        self.mesh, self.regions = mesh, regions

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens = x.shape[1]
        if self.mesh is not None:
            x = parallel.shard(x, self.mesh)
        for block in self.inner.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.regions else block(x))
        return [x if self.mesh is None else parallel.gather(x, self.mesh, tokens=tokens)]


def _x(tokens: int = 13, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, CHANNELS)


def regions(rank: int, ranks: int) -> dict[str, float]:
    """Attention inside checkpoints, with gradients."""
    mesh = mesh_of(ranks)
    whole, parts = Shared(None), Shared(mesh, regions=True)
    parts.compile(backend="sparseattn", fullgraph=True, options=options_of(mesh))
    return compare(whole, parts, (_x(),), ranks, grad=True)


def causal(rank: int, ranks: int) -> dict[str, float]:
    """The flag is_causal is over the whole sequence."""
    mesh = mesh_of(ranks)
    whole, parts = Shared(None, is_causal=True), Shared(mesh, is_causal=True)
    parts.compile(backend="sparseattn", fullgraph=True, options=options_of(mesh))
    return compare(whole, parts, (_x(),), ranks, grad=True)


def inductor(rank: int, ranks: int, *, method: str = "ulysses") -> dict[str, float]:
    """The same by Inductor; causal on a ring, where ranks have different graphs."""
    mesh = mesh_of(ranks)
    arguments: dict[str, Any] = {"is_causal": method == "ring", "layers": 1}
    whole, parts = Shared(None, **arguments), Shared(mesh, **arguments)
    options = options_of(mesh, method, inner_backend="inductor")
    parts.compile(backend="sparseattn", fullgraph=True, options=options)
    return compare(whole, parts, (_x(),), ranks, grad=True)


def given_shards(rank: int, ranks: int) -> float:
    """A model that gets shards and is told how many tokens there are."""
    mesh, x = mesh_of(ranks), _x()
    model = Shared(None)
    expected = model(x)[0]
    options = {**options_of(mesh), "parallel": parallel.ContextParallel(mesh, tokens=x.shape[1])}
    model.compile(backend="sparseattn", fullgraph=True, options=options)
    got = parallel.gather(model(parallel.shard(x, mesh))[0], mesh, tokens=x.shape[1])
    return distance([got], [expected])


def steps(rank: int, ranks: int) -> dict[str, int]:
    """Five steps of one compiled model: its graphs, and its collectives forward and backward."""
    mesh = mesh_of(ranks)
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        from sparseattn.fx_passes.backend import sparseattn_backend  # noqa: F401  (the entry point finds it)

        return aot_autograd(fw_compiler=lambda g, i: make_boxed_func(keep(g, i)))(graph, inputs)

    torch._dynamo.register_backend(backend, name="kept") if "kept" not in torch._dynamo.list_backends(()) else None
    parts = Shared(mesh)
    parts.compile(backend="sparseattn", fullgraph=True, options={**options_of(mesh), "inner_backend": "kept"})
    for _ in range(5):
        parts(_x())[0].sum().backward()
    exchanges = [sum("all_to_all" in target for target in graph) for graph in graphs]
    return {"graphs": len(graphs), "forward": exchanges[0], "backward": exchanges[1]}


def counted(rank: int, ranks: int, *, policy: Any = "exact", **asked: Any) -> dict[str, int]:
    """Bytes of the report, and those that a wrapped process group was given for other ranks."""
    if not hasattr(dist.Backend, "COUNTING"):
        dist.Backend.register_backend("counting", Counting.create, devices=["cpu"])
    group = dist.new_group(backend="counting")
    mesh = DeviceMesh.from_group(group, "cpu")
    parts = Shared(mesh)
    options = options_of(mesh, policy=policy, parallel=parallel.ContextParallel(mesh, **asked))
    parts.compile(backend="sparseattn", fullgraph=True, options=options)
    with torch.no_grad():
        parts(_x())
        Counting.sent = Counting.calls = 0
        Counting.gathered = []
        parts(_x())
    rows = sparseattn.last_report().rows
    return {
        "reported": sum(row.communication.sent for row in rows),
        "collectives": sum(row.communication.collectives for row in rows),
        "sent": Counting.sent,
        "calls": Counting.calls,
        "gathered": sum(Counting.gathered[:-1]) * (ranks - 1),  # the last is the output
    }


class Counting(dist.ProcessGroup):
    """Gloo, that counts what it is given to exchange."""

    sent = calls = 0
    gathered: ClassVar[list[int]] = []

    def __init__(self, inner: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.inner = inner

    @classmethod
    def create(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Counting:
        """The creator that torch.distributed calls."""
        return cls(dist.ProcessGroupGloo(store, rank, size, timeout=timeout), rank, size)

    def getBackendName(self) -> str:  # noqa: N802
        return "counting"

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def alltoall_base(self, out: Tensor, given: Tensor, taken: list[int], sizes: list[int], *how: Any) -> Any:
        Counting.calls += 1
        rows = [part.nbytes for part in given.split(sizes)]
        Counting.sent += sum(rows) - rows[self.rank()]
        return self.inner.alltoall_base(out, given, taken, sizes, *how)

    def allgather(self, *given: Any) -> Any:
        return self.inner.allgather(*given)

    def allgather_into_tensor_coalesced(self, outs: list[Tensor], given: list[Tensor], *_how: Any) -> Any:
        Counting.gathered += [part.nbytes for part in given]
        return self.inner.allgather([list(out.chunk(self.size())) for out in outs], given)


def other_shapes(rank: int, ranks: int) -> str:
    """One rank has an input of another length."""
    mesh = DeviceMesh.from_group(dist.new_group(), "cpu")  # one that has compared nothing yet
    return _error(lambda: compiled(Shared(mesh), mesh)(_x(13 if rank else 15)))


def too_many_ranks(rank: int, ranks: int) -> str:
    """Fewer heads than ranks."""
    mesh = mesh_of(ranks)
    model = Shared(mesh)
    model.inner = Blocks(layers=1, heads=1, head_dim=CHANNELS)
    asked = parallel.ContextParallel(mesh, method="ulysses")
    return _error(lambda: compiled(model, mesh, parallel=asked)(_x()))


def lost(rank: int, ranks: int) -> str:
    """A rank dies between two steps."""
    return _second_step(rank, lambda: os._exit(0))


def late(rank: int, ranks: int) -> str:
    """A rank stays away for longer than the time-out of its group."""
    return _second_step(rank, lambda: time.sleep(12))


def _second_step(rank: int, fate: Any) -> str:
    group = dist.new_group(timeout=timedelta(seconds=6))
    mesh = DeviceMesh.from_group(group, "cpu")
    parts = compiled(Shared(mesh), mesh)
    with torch.no_grad():
        parts(_x())
        dist.barrier(group)
        if rank:
            fate()
            return ""
        return _error(lambda: parts(_x()))


def _error(call: Any) -> str:
    began = time.monotonic()
    try:
        call()
    except Exception as error:
        return f"{time.monotonic() - began:.0f} s: {type(error).__name__}: {error}"
    return ""


def topk() -> dict[str, Any]:
    """A policy of block_topk."""
    params = {"keep_ratio": 0.5, "block_q": 16, "block_k": 16}
    return {"name": "topk", "rules": [{"use": "block_topk", "mode": "require", "params": params}]}


def options_of(mesh: DeviceMesh, method: Any = "auto", **more: Any) -> dict[str, Any]:
    """Options of the backend."""
    asked = parallel.ContextParallel(mesh, method=method)
    return {"policy": "exact", "inner_backend": "aot_eager", "parallel": asked, **more}


RUNS = {
    "counted": counted,
    "regions": regions,
    "causal": causal,
    "given_shards": given_shards,
    "steps": steps,
    "other_shapes": other_shapes,
    "too_many_ranks": too_many_ranks,
    "inductor": inductor,
    "ring_counted": partial(counted, method="ring"),
    "blocks_counted": partial(counted, policy=topk(), method="ring"),
    "int8_counted": partial(counted, policy={"rules": [{"use": "sage", "mode": "require"}]}, wire="int8"),
    "int8": sharded_wire.CASES["shifted"],
    "ring_inductor": partial(inductor, method="ring"),
    **FEW,
}
MISSED = {"late": late, "lost": lost}
