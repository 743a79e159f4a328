"""What one rank does in the tests of DTensor rules: every op on split inputs, and how far it is from the op on all."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from support.every_op import ON_TOKENS, ON_VIDEO, SMALL
from support.sharded_cases import distance, mesh_of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from sparseattn import parallel
from sparseattn.attn_ops.op import FORWARDS

BATCH, HEADS, TOKENS, HEAD_DIM = 2, 4, 64, 16
MORE: dict[str, dict[str, Any]] = {
    "block_sparse_attention": {"block_q": 16, "block_k": 16},
    "sage_attention_quantized": {},
}
OPS = {**ON_TOKENS, **ON_VIDEO, **MORE, "flash_attention": {"causal": True}}
GRADED = [name for name in OPS if hasattr(torch.ops.sparseattn, f"{name}_backward")]
Given = dict[str, Tensor]


def inputs(name: str, heads: int = HEADS, kv_heads: int = HEADS) -> Given:
    """The tensors of a call."""
    torch.manual_seed(0)
    dims = (TOKENS, HEAD_DIM)
    found = {"q": torch.randn(BATCH, heads, *dims)} | {of: torch.randn(BATCH, kv_heads, *dims) for of in "kv"}
    if name == "sage_attention_quantized":
        found |= {of: (found[of] * 50).to(torch.int8) for of in "qk"}
        found |= {f"{of}_scale": torch.rand(found[of].shape[:-1]) / 50 for of in "qk"}
    if name == "block_sparse_attention":
        found["block_index"] = torch.arange(4, dtype=torch.int32).expand(1, heads, 4, 4).contiguous()
        found["block_count"] = torch.arange(4, dtype=torch.int32).expand(1, heads, 4) + 1
        found["key_sizes"] = torch.tensor([16, 7, 16, 3], dtype=torch.int32)
    if "linear" in name:
        found |= {"weight": torch.randn(HEAD_DIM, HEAD_DIM), "bias": torch.randn(HEAD_DIM)}
    if name == "video_sparse_attention":
        found["gate"] = torch.rand(found["q"].shape)
    return found


def called(name: str, tensors: Given, grad: bool) -> tuple[list[Any], list[Any]]:
    """The results of a call, and the gradients of all that has one."""
    given = [tensor.detach().requires_grad_(grad and tensor.is_floating_point()) for tensor in tensors.values()]
    out, lse = getattr(torch.ops.sparseattn, name)(*given, **OPS[name])
    if not grad:
        return [out, lse], []
    (out.square().mean() + lse.square().mean()).backward()
    return [out.detach(), lse.detach()], [tensor.grad for tensor in given if tensor.requires_grad]


def placed(tensors: Given, mesh: DeviceMesh, placement: Placement) -> dict[str, Tensor]:
    """The same as DTensors: q, k and v split, and what else has batch and heads; the rest on every rank."""
    whole = ("weight", "bias", "key_sizes", "block_index", "block_count")
    return {
        name: distribute_tensor(tensor, mesh, [Replicate() if name in whole or tensor.shape[1] == 1 else placement])
        for name, tensor in tensors.items()
    }


def apart(found: list[Any], expected: list[Any]) -> float:
    """How far DTensors are from tensors."""
    return distance([one.full_tensor() for one in found], expected)


def split(dim: int, kv_heads: int, rank: int, ranks: int) -> dict[str, float]:
    """Every op, with gradients where it has them, on batch or heads of two ranks; its output stays split so."""
    parallel.register_dtensor()
    assert set(OPS) == set(FORWARDS)
    mesh, far = mesh_of(ranks), {}
    for name in OPS:
        grad, tensors = name in GRADED, inputs(name, kv_heads=kv_heads)
        results, grads = called(name, placed(tensors, mesh, Shard(dim)), grad)
        assert [result.placements for result in results] == [(Shard(dim),)] * 2, name
        expected, wanted = called(name, tensors, grad)
        far[name] = apart([*results, *grads], [*expected, *wanted])
    return far


def whole_heads(rank: int, ranks: int) -> dict[str, float]:
    """What does not let heads be split is computed from all of them, and right."""
    parallel.register_dtensor()
    mesh, far = mesh_of(ranks), {}
    cases: dict[str, tuple[str, int, dict[str, Any]]] = {
        "odd groups": ("flash_attention", 3, {}),
        "windows of heads": ("sliding_tile_attention", 6, {"window": [1, 1, 2] * 5 + [1, 2, 1]}),
        "one window": ("sliding_tile_attention", 6, {"window": [1, 1, 2]}),  # same shapes: decided anew
        "gates of all heads": ("vmoba_attention", 6, {"select": "threshold", "threshold_type": "overall"}),
    }
    for case, (name, kv_heads, more) in cases.items():
        tensors = inputs(name, 6, kv_heads)
        options = {key: value for key, value in OPS[name].items() if key not in more}
        op = getattr(torch.ops.sparseattn, name)
        found, _ = op(*placed(tensors, mesh, Shard(1)).values(), **{**options, **more})
        assert (found.placements == (Shard(1),)) == (case == "one window"), case
        far[case] = apart([found], [op(*tensors.values(), **{**options, **more})[0]])
    return far


def tokens(rank: int, ranks: int) -> dict[str, float]:
    """Tokens that are split are redistributed first."""
    parallel.register_dtensor()
    mesh, tensors = mesh_of(ranks), inputs("flash_attention")
    found, grads = called("flash_attention", placed(tensors, mesh, Shard(2)), grad=True)
    expected, wanted = called("flash_attention", tensors, grad=True)
    assert Shard(2) not in found[0].placements
    return {"out": apart(found, expected), "grad": apart(grads, wanted)}


def ratios(rank: int, ranks: int) -> dict[str, float]:
    """Parameters as tensors: one for all heads, and one of each head, split as q is or on every rank."""
    parallel.register_dtensor()
    mesh, tensors = mesh_of(ranks), inputs("block_topk_attention")
    values, far = torch.tensor([0.25, 0.5, 1.0, 0.25]), {}
    op = torch.ops.sparseattn.block_topk_attention
    options = {key: value for key, value in SMALL.items() if key != "keep_ratio"}
    expected = op(*tensors.values(), **options, keep_ratios=values)[0]
    parts = placed(tensors, mesh, Shard(1))
    for placement in (Shard(0), Replicate()):
        placed_ratios = distribute_tensor(values, mesh, [placement])
        far[str(placement)] = apart([op(*parts.values(), **options, keep_ratios=placed_ratios)[0]], [expected])
    one = torch.tensor(0.5)
    expected = op(*tensors.values(), **options, keep_ratios=one)[0]
    return {**far, "one": apart([op(*parts.values(), **options, keep_ratios=one)[0]], [expected])}


def compiled(rank: int, ranks: int) -> dict[str, float]:
    """In one graph, with gradients."""
    parallel.register_dtensor()
    mesh, tensors = mesh_of(ranks), inputs("flash_attention")
    parts = {of: tensor.requires_grad_() for of, tensor in placed(tensors, mesh, Shard(1)).items()}

    def attend(q: DTensor, k: DTensor, v: DTensor) -> Tensor:
        out: Tensor = torch.ops.sparseattn.flash_attention(q * 2, k, v)[0]
        return out * 3

    found = torch.compile(attend, backend="aot_eager", fullgraph=True)(*parts.values())
    found.square().mean().backward()
    whole = [tensor.requires_grad_() for tensor in tensors.values()]
    expected = attend(*whole)
    expected.square().mean().backward()
    grads = [part.grad for part in parts.values()]
    return {"out": apart([found], [expected]), "grad": apart(grads, [one.grad for one in whole])}


CASES = {
    "batch": partial(split, 0, HEADS),
    "heads": partial(split, 1, HEADS),
    "grouped heads": partial(split, 1, 2),
    "one kv head": partial(split, 1, 1),
    "whole heads": whole_heads,
    "tokens": tokens,
    "ratios": ratios,
    "compiled": compiled,
}
