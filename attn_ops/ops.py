"""The ops as typed Python functions: the calls of `torch.ops.sparseattn.*` with names, types and documentation."""

from .backends.block_sparse import block_sparse_attention
from .backends.block_topk import block_topk_attention
from .backends.flash import flash_attention
from .backends.sage import sage_attention

__all__ = ["block_sparse_attention", "block_topk_attention", "flash_attention", "sage_attention"]
