"""What one rank does in the tests of rings: causal or not, with text, grouped heads, and a length no ranks divide."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from support.sharded_cases import compare
from support.sharded_runs import options_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import scaled_dot_product_attention

import sparseattn
from sparseattn import parallel

HEADS, HEAD_DIM, TOKENS, TEXT = 4, 8, 13, 5


class Joint(nn.Module):
    """One attention over a video that ranks share and text that all of them hold, with scales to train."""

    def __init__(self, mesh: DeviceMesh | None, *, text_first: bool | None, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scales = nn.Parameter(1 + torch.rand(3, HEAD_DIM) / 4)
        self.mesh, self.text_first, self.causal = mesh, text_first, causal

    def forward(self, video: list[Tensor], text: list[Tensor]) -> list[Tensor]:
        tokens = video[0].shape[2]
        if self.mesh is not None:
            video = [parallel.shard(part, self.mesh, dim=2) for part in video]
        local = video[0].shape[2]
        q, k, v = (self._joint(*parts) * scale for *parts, scale in zip(video, text, self.scales, strict=True))
        out = scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1])
        first = TEXT if self.text_first else 0
        seen = out.narrow(2, first, local)
        seen = seen if self.mesh is None else parallel.gather(seen, self.mesh, dim=2, tokens=tokens)
        return [torch.cat([out[:, :, :first], seen, out[:, :, first + local :]], dim=2)]

    def _joint(self, video: Tensor, text: Tensor) -> Tensor:
        if self.text_first is None:
            return video
        return torch.cat([text, video] if self.text_first else [video, text], dim=2)


def attention(
    rank: int,
    ranks: int,
    *,
    causal: bool = False,
    text_first: bool | None = None,
    kv_heads: int = HEADS,
    tokens: int = TOKENS,
    policy: Any = "exact",
    mesh: tuple[int, ...] = (),
) -> dict[str, float]:
    """Results and gradients of one attention, batch 2: on one rank by the same policy."""
    shared, sizes = init_device_mesh("cpu", mesh or (ranks,)), (HEADS, kv_heads, kv_heads)
    video = [torch.randn(2, size, tokens, HEAD_DIM) for size in sizes]
    text = [torch.randn(2, size, TEXT, HEAD_DIM) for size in sizes]
    whole, parts = (Joint(on, text_first=text_first, causal=causal) for on in (None, shared))
    options = options_of(shared, "auto" if mesh else "ring", policy=policy)
    parts.compile(backend="sparseattn", fullgraph=True, options=options)
    blocks = isinstance(policy, dict) and bool(policy["rules"])
    if blocks:
        whole.compile(backend="sparseattn", fullgraph=True, options={**options, "parallel": None})
    far = compare(whole, parts, (video, text), ranks, grad=True)
    (row,) = sparseattn.last_report().rows
    if rank or not blocks:  # on rank 0 it may be that of the whole
        method, collectives = (f"hybrid {mesh[1]} x {mesh[0]}", mesh[0] + 1) if mesh else ("ring", ranks - 1)
        assert (row.communication.method, row.communication.collectives) == (method, collectives + blocks)
    return far


def topk(keep_ratio: Any = 0.4, block_q: int = 16, block_k: int = 16) -> dict[str, Any]:
    """A policy of block_topk."""
    params = {"keep_ratio": keep_ratio, "block_q": block_q, "block_k": block_k}
    return {"name": "topk", "rules": [{"use": "block_topk", "mode": "require", "params": params}]}


RINGS = {
    "dense": partial(attention, policy={"name": "dense", "rules": []}),
    "causal": partial(attention, causal=True, kv_heads=2),
    "text": partial(attention, text_first=False, kv_heads=2),
    "causal, text": partial(attention, text_first=False, causal=True, kv_heads=1),
    "causal, text first": partial(attention, text_first=True, causal=True),
    "a rank without tokens": partial(attention, tokens=4, kv_heads=1),
    "blocks": partial(attention, tokens=192, policy=topk(block_q=32)),
    "blocks on several ranks, text": partial(
        attention, tokens=157, kv_heads=2, text_first=False, policy=topk([0.2, 0.3, 0.5, 0.7], block_q=32)
    ),
    "blocks, causal, text first": partial(
        attention, tokens=157, kv_heads=1, causal=True, text_first=True, policy=topk()
    ),
    "all in one block": partial(attention, tokens=4, causal=True, policy=topk()),
}
HYBRIDS = {
    "hybrid": partial(attention, mesh=(2, 2), kv_heads=2, text_first=False, causal=True),
    "hybrid, blocks": partial(
        attention, mesh=(2, 2), tokens=157, kv_heads=2, text_first=True, policy=topk([0.2, 0.3, 0.5, 0.7])
    ),
}
