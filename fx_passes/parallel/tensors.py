"""shard and gather: a tensor of all tokens as this rank's part of them, and back; masks, which stay whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...attn_ops.errors import ArgumentError
from ...attn_ops.sharding import SHARD_TOKENS, WHOLE_MASK, local_tokens
from ...lowering.context_parallel import rank_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """The tokens of this rank, of a tensor that is the same on all ranks.

    Compiled with the option `parallel`, attention over what is computed from them is attention over all tokens.

    Args:
        x: (..., S, ...), the tokens at dimension `dim`.
        mesh: a DeviceMesh of one dimension, or of two, (ring, ulysses).
        dim: dimension of the tokens.

    Returns:
        (..., ceil(S / ranks), ...): the last ranks have copies of the last token where the ranks do not divide S.
    """
    local: Tensor = SHARD_TOKENS(x, dim % x.dim(), mesh.size(), rank_of(mesh))
    return local


def gather(x: Tensor, mesh: DeviceMesh, dim: int = 1, tokens: int | None = None) -> Tensor:
    """The tensor of all tokens, on every rank, from what each has of it; the inverse of `shard`.

    Its gradient is the sum of what all ranks give to their copies. With the gradients of the parameters averaged over
    the ranks, as data parallelism does, they are those of a model on one rank.

    Args:
        x: (..., ceil(S / ranks), ...), as `shard` gives.
        mesh: a DeviceMesh of one dimension, or of two, (ring, ulysses).
        dim: dimension of the tokens.
        tokens: S; None if the ranks divide it.

    Raises:
        ArgumentError: if shards of x's size do not make so many tokens.
    """
    from torch.distributed._functional_collectives import all_gather_tensor_autograd

    dim, ranks = dim % x.dim(), mesh.size()
    tokens = x.shape[dim] * ranks if tokens is None else tokens
    if local_tokens(tokens, ranks) != x.shape[dim]:
        must = f"be those of {ranks} shards of {x.shape[dim]}"
        raise ArgumentError("gather", "tokens", must, tokens, "Give the number that `shard` was given.")
    gathered = x.contiguous()
    for of_mesh in reversed(range(mesh.ndim)):
        gathered = all_gather_tensor_autograd(gathered, dim, (mesh, of_mesh))
    return gathered.narrow(dim, 0, tokens)


def whole_mask(mask: Tensor, tokens: int) -> Tensor:
    """A mask over the whole sequence, to be given to attention among local tokens.

    What it returns only has the shape that local tokens ask for: compiled with the option `parallel`, attention gets
    `mask` itself.

    Args:
        mask: (..., Sq or 1, Sk or 1) bool or float, over all tokens.
        tokens: tokens of the sequence on this rank, text that every rank holds among them.
    """
    local: Tensor = WHOLE_MASK(mask, tokens)
    return local
