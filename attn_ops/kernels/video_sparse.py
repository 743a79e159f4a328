"""Video sparse attention: a coarse branch over means of tiles, and block-sparse attention to the best tiles.

What all its providers share; they differ in who computes the block-sparse part. All here is in tile order, and means
are fp32. What the padding of short tiles holds reaches no mean, no key and no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks.by_device import block_mean
from ..blocks.tile_selection import TilePlan, choose_tiles, split_tiles
from ..blocks.tiles import Tiling
from ..layout import like_query
from .coarse_branch import CoarseBranch, coarse_branch


class _Order:
    """A tiling on a device: the way into tile order and back, and means of tiles. Its tensors are computed once.

    They are not kept from call to call: CUDA graphs forbid tensors that outlive the call they were made in.
    """

    def __init__(self, tiling: Tiling, tiled: bool, device: torch.device) -> None:
        self.tiling, self._tiled = tiling, tiled
        self._places = None if tiled else tiling.places(device)
        self.sizes = tiling.sizes(device)

    def enter(self, x: Tensor, dim: int = -2) -> Tensor:
        """Bring x into tile order, with 0 in the padding."""
        return (
            self.tiling.fill_padding(x, dim=dim) if self._tiled else self.tiling.to_tiles(x, dim, places=self._places)
        )

    def leave(self, x: Tensor, padding: float = 0.0, dim: int = -2) -> Tensor:
        """Bring x back into the order in which the tensors came."""
        if self._tiled:
            return self.tiling.fill_padding(x, padding, dim)
        return self.tiling.from_tiles(x, dim, places=self._places)

    def tiles(self, x: Tensor) -> Tensor:
        """(B, H, tiles * volume, D) as (B, H, tiles, volume, D)."""
        tiles: Tensor = x.unflatten(2, (self.tiling.tiles, self.tiling.volume))
        return tiles

    def means(self, x: Tensor) -> Tensor:
        """Mean over the tokens of every tile, (B, H, tiles, D) fp32, of x with 0 in the padding."""
        return block_mean(x, self.tiling.volume, self.sizes)

    def with_gradient_of_means(self, grad: Tensor, grad_means: Tensor) -> Tensor:
        """Add every token's share of the gradient of its tile's mean, grad_means: (B, H, tiles, D)."""
        share = grad_means / self.sizes.unsqueeze(-1)
        return _whole(self.tiles(grad) + share.unsqueeze(3), grad.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    sparsities: Tensor | None,
    *,
    plan: TilePlan,
    provider: str,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to k, v: (B, Hkv, Sk, D), gate like q or None.

    `provider` computes the block-sparse part, in blocks of `block` tokens that divide a tile; None is a tile.
    Returns out like q and lse (B, Hq, Sq) fp32.
    """
    like = q
    queries, keys = _orders(plan, q.device)
    q, k, v = queries.enter(q), keys.enter(k), keys.enter(v)
    coarse = _coarse(q, k, None if gate is None else v, queries, keys, plan.scale)
    lists, block = _lists(coarse, sparsities, keys, plan, block)
    out, lse = torch.ops.sparseattn.block_sparse_attention(
        q, k, v, *lists, block_q=block, block_k=block, scale=plan.scale, provider=provider
    )
    if gate is not None:
        gates = queries.tiles(queries.enter(gate))
        out = _whole(torch.addcmul(queries.tiles(out), gates, coarse.out.unsqueeze(3)), q.dtype)
    return like_query(queries.leave(out), like), queries.leave(lse, -torch.inf, dim=-1)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    sparsities: Tensor | None,
    *,
    plan: TilePlan,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k, v and gate, the chosen tiles held fixed; an empty one without a gate."""
    given = q, k, v
    queries, keys = _orders(plan, q.device)
    grad_out, out, q, k, v = *map(queries.enter, (grad_out, out, q)), keys.enter(k), keys.enter(v)
    lse = queries.enter(lse, dim=-1)
    grad_lse = None if grad_lse is None else queries.enter(grad_lse, dim=-1)
    coarse = _coarse(q, k, None if gate is None else v, queries, keys, plan.scale)
    lists, block = _lists(coarse, sparsities, keys, plan, None)
    grad_gate, of_means = q.new_empty(0), None
    if gate is not None:
        rows, gates, branch = queries.tiles(grad_out), queries.tiles(queries.enter(gate)), coarse.out.unsqueeze(3)
        # That of the sparse part, without attending again. In half precision it is coarse: no provider relies on it.
        out = _whole(torch.addcmul(queries.tiles(out), gates, branch, value=-1), q.dtype)
        grad_gate = like_query(queries.leave(_whole(rows * branch, q.dtype)), gate)
        of_means = coarse.gradients((rows.float() * gates).sum(dim=3))
    grads = torch.ops.sparseattn.block_sparse_attention_backward(
        grad_out, grad_lse, out, lse, q, k, v, *lists, block, block, False, plan.scale, provider
    )
    orders = queries, keys, keys
    if of_means is not None:
        grads = map(_Order.with_gradient_of_means, orders, grads, of_means)
    grad_q, grad_k, grad_v = (
        like_query(order.leave(grad), x) for order, grad, x in zip(orders, grads, given, strict=True)
    )
    return grad_q, grad_k, grad_v, grad_gate


def _orders(plan: TilePlan, device: torch.device) -> tuple[_Order, _Order]:
    """The orders of queries and of keys; one and the same in self-attention."""
    queries = _Order(plan.queries, plan.tiled, device)
    return queries, queries if plan.keys == plan.queries else _Order(plan.keys, plan.tiled, device)


def _coarse(q: Tensor, k: Tensor, v: Tensor | None, queries: _Order, keys: _Order, scale: float) -> CoarseBranch:
    """That of q: (B, Hq, nq * volume, D) and k, v: (B, Hkv, nk * volume, D), 0 in their padding; v None for no gate."""
    return coarse_branch(queries.means(q), keys.means(k), None if v is None else keys.means(v), scale)


def _lists(
    coarse: CoarseBranch, sparsities: Tensor | None, keys: _Order, plan: TilePlan, block: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor | None], int]:
    """(block_index, block_count, key_sizes) for block-sparse attention, and the tokens of a block."""
    index, count = choose_tiles(coarse.scores, sparsities, plan)
    sizes, volume = None if keys.tiling.is_full else keys.sizes, keys.tiling.volume
    if block is None or block == volume:
        return (index, count, sizes), volume
    return split_tiles(index, count, sizes, volume // block, block), block


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, tiles, volume, D) as (B, H, tiles * volume, D) of that dtype."""
    return x.flatten(2, 3).to(dtype)
