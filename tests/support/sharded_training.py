"""What one rank does in the tests of FSDP2 together with context parallelism: a step of training on a mesh (dp, cp)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from support.sharded_cases import distance
from support.sharded_memory import CASES as MEMORY
from support.sharded_runs import Shared
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparseattn import parallel

BATCH, TOKENS, CHANNELS = 4, 13, 64


def step(rank: int, ranks: int, *, regional: bool) -> dict[str, float]:
    """Parameters after a step, whole: FSDP2 around the model, or around its blocks, which are compiled one by one."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "cp"))
    x, cp, everyone = torch.randn(BATCH, TOKENS, CHANNELS), mesh["cp"], mesh._flatten("dp_cp")
    whole, parts = Shared(None), Shared(cp)
    options = {"policy": "exact", "inner_backend": "aot_eager"}
    if regional:  # a block does not see how many tokens there are
        told = parallel.ContextParallel(cp, tokens=TOKENS)
        for block in parts.inner.blocks:
            block.compile(backend="sparseattn", fullgraph=True, options={**options, "parallel": told})
            fully_shard(block, mesh=everyone)
    fully_shard(parts, mesh=everyone)
    if not regional:
        shared = {**options, "parallel": parallel.ContextParallel(cp)}
        parts.compile(backend="sparseattn", fullgraph=True, options=shared)
    _train(whole, x)
    _train(parts, x.chunk(ranks // 2)[mesh.get_local_rank("dp")])
    found: list[Any] = [parameter.full_tensor() for parameter in parts.parameters()]
    moved = [
        (one - other).abs().max() for one, other in zip(whole.parameters(), Shared(None).parameters(), strict=True)
    ]
    return {"far": distance(found, list(whole.parameters())), "moved": float(min(moved))}


def _train(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # what moves is the gradient
    model(x)[0].square().mean().backward()
    optimizer.step()


CASES = {"whole": partial(step, regional=False), "regional": partial(step, regional=True), **MEMORY}
