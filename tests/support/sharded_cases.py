"""What one rank does in the tests of context parallelism: the whole model, its shard of it, and how far they are apart.

Gradients are averaged over the ranks, as data parallelism does; every rank has the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from support import sharded_models, sharded_ops
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import sparseattn
from sparseattn import parallel


def mesh_of(ranks: int) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh("cpu", (ranks,))


def compiled(model: Callable[..., Any], mesh: DeviceMesh | None, policy: Any = "exact", **more: Any) -> Any:
    """The model compiled in one graph, on the shards of a mesh if there is one."""
    shared = {} if mesh is None else {"parallel": parallel.ContextParallel(mesh)}
    options = {"policy": policy, "inner_backend": "aot_eager", **shared, **more}
    return torch.compile(model, backend="sparseattn", fullgraph=True, options=options)


def gradients(model: nn.Module, results: list[Tensor], ranks: int) -> dict[str, Tensor]:
    """The gradients of a loss on the results, the mean over so many ranks."""
    model.zero_grad(set_to_none=True)
    torch.stack([result.square().mean() for result in results]).sum().backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    for grad in found.values() if ranks > 1 else ():
        dist.all_reduce(grad)
        grad /= ranks
    return {name: grad.clone() for name, grad in found.items()}


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference of an entry; infinite where there are others, or one is NaN."""
    if [one.shape for one in ours] != [one.shape for one in theirs]:
        return float("inf")
    far = max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))
    return far if far == far else float("inf")


def compare(whole: Any, parts: Any, inputs: tuple[Any, ...], ranks: int, *, grad: bool) -> dict[str, float]:
    """How far results, and gradients, of the model on shards are from those of the whole one."""
    with torch.set_grad_enabled(grad):
        got = list(parts(*inputs))
        found = gradients(parts, got, ranks) if grad else {}
        told: list[Any] = [None]
        if dist.get_rank() == 0:  # the others need not compile it too
            expected = list(whole(*inputs))
            told = [([one.detach() for one in expected], gradients(whole, expected, 1) if grad else {})]
    dist.broadcast_object_list(told)
    expected, wanted = told[0]
    assert wanted.keys() == found.keys()
    far = {"out": distance(got, expected)}
    return {**far, "grad": distance(list(found.values()), list(wanted.values()))} if grad else far


def ops(rank: int, ranks: int, *, kv_heads: int, grad: bool, names: tuple[str, ...] | None = None) -> dict[str, float]:
    """Every method with a gradient, or without one, or those of some names, at 4 heads."""
    methods = sharded_ops.GRADED if grad else sharded_ops.UNGRADED
    methods = {name: params for name, params in methods.items() if names is None or name in names}
    mesh, policy = mesh_of(ranks), sharded_ops.policy(methods)
    models = []
    for on in (None, mesh):
        torch.manual_seed(1)
        model = sharded_ops.Sites(methods, 4, on)
        shared = {} if on is None else {"parallel": parallel.ContextParallel(on)}
        options = {"policy": policy, "inner_backend": "aot_eager", **shared}
        model.compile(backend="sparseattn", fullgraph=True, options=options)
        models.append(model)
    far = compare(*models, sharded_ops.inputs(4, kv_heads), ranks, grad=grad)
    rows = sparseattn.last_report().rows  # on rank 0 those of the whole model
    assert [row.decision.backend or "dense" for row in rows] == list(methods)
    assert all(row.communication.collectives == 2 for row in rows if rank)
    return far


def model(name: str, rank: int, ranks: int) -> dict[str, float]:
    """One model of diffusers or transformers, unmodified."""
    built, inputs = sharded_models.build(name)
    expected = sharded_models.result(built(**inputs))
    wanted = gradients(built, [expected], 1)
    mesh = mesh_of(ranks)
    with parallel.shard_model(built, mesh):
        got = sharded_models.result(compiled(built, mesh)(**inputs))
        found = gradients(built, [got], ranks)
    torch._dynamo.reset()
    assert wanted.keys() == found.keys()
    again = sharded_models.result(built(**inputs))
    return {
        "out": distance([got], [expected]),
        "grad": distance(list(found.values()), list(wanted.values())),
        "off": distance([again], [expected]),
    }


OPS = {
    "with gradients, 2 kv heads": partial(ops, kv_heads=2, grad=True),
    "without": partial(ops, kv_heads=4, grad=False),
}
FEW = {"a few": partial(ops, kv_heads=2, grad=True, names=("flash", "vsa"))}
MODELS = {name: partial(model, name) for name in ("llama", "wan")}
EVERY_MODEL = {name: partial(model, name) for name in sharded_models.MODELS}
EVERY = {**{f"ops {name}": case for name, case in OPS.items()}, **EVERY_MODEL}
