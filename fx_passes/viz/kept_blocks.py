"""The blocks that a method keeps of queries and keys, by the function that its op selects with, as a BlockIndex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attn_ops.blocks.block_index import BlockIndex
from ...attn_ops.blocks.by_device import block_mean
from ...attn_ops.blocks.pooled import choose_blocks
from ...attn_ops.blocks.sla_method import SlaMethod
from ...attn_ops.blocks.sliding_tiles import fitted, window_lists
from ...attn_ops.blocks.sparge_map import sparge_block_map
from ...attn_ops.blocks.tile_selection import TilePlan, choose_tiles
from ...attn_ops.blocks.tiles import Tiling
from ...attn_ops.kernels.coarse_branch import coarse_branch
from ...attn_ops.video_layout import VideoLayout


class Site(NamedTuple):
    """What a selection reads.

    Args:
        q: (B, Hq, S, D).
        k: (B, Hkv, S, D).
        causal: query i sees keys 0 ... i.
        scale: factor on the scores.
        layout: where the video and text tokens lie; None if it is not known.
    """

    q: Tensor
    k: Tensor
    causal: bool
    scale: float
    layout: VideoLayout | None

    def with_lists(self, lists: tuple[Tensor, Tensor], block_q: int, block_k: int) -> BlockIndex:
        """Lists of blocks in the order of the tokens."""
        return BlockIndex(*lists, block_q, block_k, self.q.shape[2], self.k.shape[2])

    def tiling(self, tile: tuple[int, int, int]) -> Tiling:
        """The tiles of a method that a policy does not let near a site without a layout."""
        assert self.layout is not None
        return Tiling(self.layout, tile)


Parameters = dict[str, Any]
"""Every parameter of the backend and, of those that vary, its tensor by the name of the op's argument."""


def _block_topk(site: Site, given: Parameters) -> BlockIndex:
    ratio, blocks = _either(given, "keep_ratios", "keep_ratio"), (given["block_q"], given["block_k"])
    lists = choose_blocks(site.q, site.k, keep_ratio=ratio, block_q=blocks[0], block_k=blocks[1], causal=site.causal)
    return site.with_lists(lists, *blocks)


def _sparge(site: Site, given: Parameters) -> BlockIndex:
    own = {name: value for name, value in given.items() if not name.startswith("pv")}
    lists = sparge_block_map(site.q, site.k, causal=site.causal, scale=site.scale, **own)
    return site.with_lists(lists, given["block_q"], given["block_k"])


def _sla(site: Site, given: Parameters) -> BlockIndex:
    names = "keep_ratio", "variant", "feature_map", "block_q", "block_k", "compat"
    method = SlaMethod(**{name: given[name] for name in names}, keep_ratios=given.get("keep_ratios"))
    return site.with_lists(method.critical_blocks(site.q, site.k), given["block_q"], given["block_k"])


def _sta(site: Site, given: Parameters) -> BlockIndex:
    tiling = fitted(site.tiling(given["tile"]))
    window = _either(given, "windows", "window")
    index, count, sizes = window_lists(tiling, window, given["text_length"], site.q.device)
    return _of_tiles(tiling, index, count, sizes)


def _vsa(site: Site, given: Parameters) -> BlockIndex:
    tiling = site.tiling(given["tile"])
    sizes = tiling.sizes(site.q.device)
    mean_q, mean_k = (block_mean(tiling.to_tiles(x), tiling.volume, sizes) for x in (site.q, site.k))
    scores = coarse_branch(mean_q, mean_k, None, site.scale).scores
    plan = TilePlan(tiling, tiling, False, given["sparsity"], site.scale)
    index, count = choose_tiles(scores, given.get("sparsities"), plan)
    return _of_tiles(tiling, index, count, None if tiling.is_full else sizes)


def _either(given: Parameters, tensor: str, name: str) -> Any:
    """The tensor in place of a parameter, if there is one."""
    return given[tensor] if tensor in given else given[name]


def _of_tiles(tiling: Tiling, index: Tensor, count: Tensor, sizes: Tensor | None) -> BlockIndex:
    """Lists of tiles, in tile order."""
    tokens, volume = tiling.padded_tokens, tiling.volume
    return BlockIndex(index, count, volume, volume, tokens, tokens, sizes)


KEPT: dict[str, Callable[[Site, Parameters], BlockIndex]] = {
    "block_topk": _block_topk,
    "sparge": _sparge,
    "sla": _sla,
    "sage_sla": _sla,
    "sta": _sta,
    "vsa": _vsa,
}
"""By the name of the backend. `vmoba` chooses token by token and has no such map."""


def as_tensor(number: float | tuple[float, ...], device: torch.device) -> Tensor:
    """A parameter that varies as its op takes it: () or (Hq,) fp32."""
    return torch.tensor(number, dtype=torch.float32, device=device)
