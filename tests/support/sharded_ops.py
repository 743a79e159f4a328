"""Every method at a site of its own, over a video that ranks share and text that all of them hold.

What is before the sites is element by element, so that both ways give them the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import scaled_dot_product_attention

from sparseattn import parallel

GRID, TEXT, HEAD_DIM = (3, 3, 5), 5, 16
BLOCKS = {"block_q": 16, "block_k": 16, "keep_ratio": 0.5}
GRADED: dict[str, dict[str, Any]] = {
    "dense": {},
    "flash": {},
    "block_topk": BLOCKS,
    "sla": BLOCKS,
    "vsa": {"tile": [1, 2, 2], "sparsity": 0.5},
    "sta": {"tile": [1, 2, 2], "window": [1, 1, 2] * 3 + [1, 3, 1]},
    "vmoba": {"chunk": [1, 0, 0], "topk": 2},
}
UNGRADED: dict[str, dict[str, Any]] = {"sage": {}, "sparge": {**BLOCKS, "mass": 0.5}, "sage_sla": BLOCKS}
"""Methods without a gradient."""


def policy(methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A rule for each method, at the layer of its name."""
    rules = []
    for name, params in methods.items():
        text = 0 if name == "vmoba" else TEXT
        layout = {"layout": {"grid": list(GRID), "text_tokens": text}} if name in ("vsa", "sta", "vmoba") else {}
        given = {"params": params} if params else {}
        mode = "prefer" if name == "dense" else "require"
        rules.append({"use": name, "modules": f"sites.{name}", "mode": mode, **layout, **given})
    return {"name": "every", "rules": rules}


class Site(nn.Module):
    """One attention, with parameters of its own in front of it, and what is attached to VSA and SLA."""

    def __init__(self, method: str, heads: int) -> None:
        super().__init__()
        self.method = method
        self.scales = nn.Parameter(1 + torch.rand(3, HEAD_DIM) / 4)
        self.weight = nn.Parameter(torch.randn(HEAD_DIM, HEAD_DIM) / 8)
        self.bias = nn.Parameter(torch.randn(HEAD_DIM) / 8)
        self.gate = nn.Parameter(torch.rand(heads * HEAD_DIM))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q * self.scales[0], k * self.scales[1], v * self.scales[2]
        if self.method == "sla":
            torch.ops.sparseattn.attach(["weight", "bias"], [self.weight, self.bias])
        if self.method == "vsa":
            torch.ops.sparseattn.attach(["gate"], [q.transpose(1, 2).flatten(2) * self.gate])
        return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


class Sites(nn.Module):
    """All methods on the same queries (B, H, S, D), keys and values (B, Hkv, S, D), shared by a mesh."""

    def __init__(self, methods: dict[str, dict[str, Any]], heads: int, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.sites = nn.ModuleDict({name: Site(name, heads) for name in methods})
        self.mesh = mesh

    def forward(self, video: list[Tensor], text: list[Tensor]) -> list[Tensor]:
        tokens = video[0].shape[2]
        if self.mesh is not None:
            video = [parallel.shard(part, self.mesh, dim=2) for part in video]
        joint = [torch.cat(parts, dim=2) for parts in zip(video, text, strict=True)]
        outs = []
        for name, site in self.sites.items():
            out = site(*(video if name == "vmoba" else joint))
            local = video[0].shape[2]
            seen, words = out[:, :, :local], out[:, :, local:]
            if self.mesh is not None:
                seen = parallel.gather(seen, self.mesh, dim=2, tokens=tokens)
            outs.append(torch.cat([seen, words], dim=2))
        return outs


def inputs(heads: int, kv_heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values of the video and of the text, batch 2."""
    tokens = GRID[0] * GRID[1] * GRID[2]
    sizes = (heads, kv_heads, kv_heads)
    video = [torch.randn(2, size, tokens, HEAD_DIM) for size in sizes]
    return video, [torch.randn(2, size, TEXT, HEAD_DIM) for size in sizes]
