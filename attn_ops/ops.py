"""The ops as typed Python functions: the calls of `torch.ops.sparseattn.*` with names, types and documentation."""

from .backends.block_sparse import block_sparse_attention
from .backends.block_topk import block_topk_attention
from .backends.flash import flash_attention
from .backends.sage import sage_attention
from .backends.sage_fp4 import sage_fp4_attention
from .backends.sage_quantized import sage_attention_quantized
from .backends.sage_sla import sage_sparse_linear_attention
from .backends.sla import sparse_linear_attention
from .backends.sparge import sparge_attention
from .backends.sta import sliding_tile_attention
from .backends.vmoba import vmoba_attention
from .backends.vsa import video_sparse_attention
from .blocks.sparge_map import sparge_block_map

__all__ = [
    "block_sparse_attention",
    "block_topk_attention",
    "flash_attention",
    "sage_attention",
    "sage_attention_quantized",
    "sage_fp4_attention",
    "sage_sparse_linear_attention",
    "sliding_tile_attention",
    "sparge_attention",
    "sparge_block_map",
    "sparse_linear_attention",
    "video_sparse_attention",
    "vmoba_attention",
]
