"""video_sparse_attention: the tiles with the best means, and a gate times attention to all means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...attn_ops.blocks.tile_selection import kept_tiles
from ...attn_ops.blocks.tiles import Tiling
from .attend import Lists, attend, spread
from .graph import INT64, Graph, Value
from .selection import block_scores, decimal, lists_of, mask_of, per_query_head, top_blocks
from .tiles import from_tiles, sizes_of, tile_mean, tiling_of, to_tiles, without_padding


def video_sparse_attention(
    graph: Graph,
    given: dict[str, Value],
    *,
    grid: Sequence[int],
    text_tokens: int,
    text_first: bool,
    tile: Sequence[int],
    kv_grid: Sequence[int] | None,
    tiled: bool,
    sparsity: float,
    scale: float,
    **_: Any,
) -> tuple[Value, Value]:
    """Body of `video_sparse_attention`."""
    queries, keys = (tiling_of(tokens, tile, text_tokens, text_first) for tokens in (grid, kv_grid or grid))
    move = without_padding if tiled else to_tiles
    q, k, v = move(given["q"], queries), move(given["k"], keys), move(given["v"], keys)
    scores = block_scores(tile_mean(q, queries), tile_mean(k, keys)) * scale
    index, count = _chosen(scores, given.get("sparsities"), sparsity, queries, keys)
    lists = Lists(index, count, queries.volume, keys.volume, sizes=sizes_of(graph, keys))
    out, lse = attend(q, k, v, lists, scale=scale)
    if "gate" in given:
        weights = graph.op("Softmax", scores, axis=3)
        coarse = weights @ per_query_head(tile_mean(v, keys), q.size(1))
        out = out + move(given["gate"], queries) * spread(coarse, queries.volume, q.size(2))
    if tiled:
        return without_padding(out, queries), without_padding(lse, queries, -float("inf"))
    return from_tiles(out, queries), from_tiles(lse, queries)


def _chosen(
    scores: Value, sparsities: Value | None, sparsity: float, queries: Tiling, keys: Tiling
) -> tuple[Value, Value]:
    """`tile_selection.choose_tiles`."""
    graph, first, videos = scores.graph, keys.first_video_tile, keys.video_tiles
    rows = scores.slice(2, queries.first_video_tile, queries.first_video_tile + queries.video_tiles)
    keep = graph.constant(kept_tiles(sparsity, videos)).reshape(1, 1, 1, 1)
    if sparsities is not None:
        left = (graph.double(1.0) - decimal(sparsities)) * graph.double(videos)
        keep = graph.op("Ceil", left).cast(INT64).reshape(1, -1, 1, 1)
    index, count = top_blocks(rows.slice(3, first, first + videos), keep)
    if not queries.text_tiles:
        return index, count
    chosen = mask_of(index, count, graph.constant([videos]))
    sides = [0, 0, queries.first_video_tile, first]
    sides += [0, 0, queries.tiles - queries.video_tiles - sides[2], keys.tiles - videos - first]
    return lists_of(graph.op("Pad", chosen.cast(INT64), sides, 1) > 0)
