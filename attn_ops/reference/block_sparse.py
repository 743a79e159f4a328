"""block_sparse_attention, defined: dense attention under the token mask that the lists of blocks spell out."""

from __future__ import annotations

from torch import Tensor

from ..blocks.block_index import BlockIndex
from .attention import masked_attention, masked_attention_backward, token_mask


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of q: (B, Hq, Sq, D) to the listed blocks of k, v: (B, Hkv, Sk, D). Returns out, lse (B, Hq, Sq)."""
    lists = BlockIndex(block_index, block_count, block_q, block_k, q.shape[2], k.shape[2], key_sizes)
    return masked_attention(q, k, v, allowed_tokens(lists, causal), scale)


def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `block_sparse_attention` with respect to q, k and v."""
    lists = BlockIndex(block_index, block_count, block_q, block_k, q.shape[2], k.shape[2], key_sizes)
    return masked_attention_backward(grad_out, grad_lse, out, lse, q, k, v, allowed_tokens(lists, causal), scale)


def allowed_tokens(lists: BlockIndex, causal: bool) -> Tensor:
    """(B or 1, H or 1, Sq, Sk) bool, True where a query may see a key of a listed block."""
    mask = lists.token_mask()
    return mask & token_mask(lists.seq_q, lists.seq_k, causal=True, device=mask.device) if causal else mask
