"""How many bytes a step of a model on shards needs at once beside its parameters and inputs, by number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from support.attention_model import Blocks
from support.sharded_cases import compiled
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sparseattn import parallel

HEADS = 8


class Sharing(nn.Module):
    """Blocks of attention on the shards of their input (B, S, C), and the whole output."""

    def __init__(self, mesh: DeviceMesh, layers: int, head_dim: int) -> None:
        super().__init__()
        self.blocks, self.mesh = Blocks(layers=layers, heads=HEADS, head_dim=head_dim), mesh

    def forward(self, x: Tensor) -> Tensor:
        return parallel.gather(self.blocks(parallel.shard(x, self.mesh)), self.mesh, tokens=x.shape[1])


def allocated(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out at once, beyond those before the call."""
    with profile(use_cpu=True, profile_memory=True) as seen:
        call()
    live = most = 0
    for event in seen.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def peaks(
    rank: int, ranks: int, *, tokens: int, layers: int, head_dim: int, phases: tuple[str, ...] = ("training",)
) -> dict[str, dict[str, int]]:
    """Bytes of this rank where 1, 2 and all ranks share a sequence, if it is one of the first group."""
    found: dict[str, dict[str, int]] = {}
    x = torch.randn(1, tokens, HEADS * head_dim)
    for shared in (1, 2, ranks):
        mesh = init_device_mesh("cpu", (ranks // shared, shared), mesh_dim_names=("copies", "cp"))["cp"]
        if rank < shared:
            model = Sharing(mesh, layers, head_dim)
            found[str(shared)] = {phase: _peak(phase, compiled(model, mesh), x) for phase in phases}
    return found


def _peak(phase: str, step: Callable[[Tensor], Tensor], x: Tensor) -> int:
    def run_once() -> None:
        with torch.set_grad_enabled(phase == "training"):
            out = step(x)
        if phase == "training":
            out.square().mean().backward()

    run_once()  # compiles; from here on gradients of parameters are there
    # The least: a thread of gloo's lets go of what was sent sooner or later.
    return min(allocated(run_once) for _ in range(5))


CASES = {"memory": partial(peaks, tokens=512, layers=4, head_dim=16)}
TABLE = {"memory": partial(peaks, tokens=2048, layers=4, head_dim=64, phases=("inference", "training"))}
