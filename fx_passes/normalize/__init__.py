"""Normalize: small exact passes that turn what models contain into one form, `scaled_dot_product_attention`.

The row, in order: `open_multihead` opens the opaque nn.MultiheadAttention node, `fuse_unfused` turns matmul, softmax,
matmul into SDPA, and so do `join_decomposed` and `join_device_sdpa` with what export's decompositions leave of it; then
two pure readers: `peel_repeat_kv` finds the key before its heads were repeated, `prove_mask`
turns a mask into a flag. What cannot be proved is left alone, and each change can be undone exactly (`restore`).
"""

from .decomposed import join_decomposed
from .device_sdpa import join_device_sdpa
from .masks import MaskFact, prove_mask
from .multihead import opaque_sites, open_multihead
from .record import Normalized
from .repeat_kv import peel_repeat_kv
from .unfused import fuse_unfused

PASSES = (open_multihead, fuse_unfused, join_decomposed, join_device_sdpa)

__all__ = [
    "PASSES",
    "MaskFact",
    "Normalized",
    "fuse_unfused",
    "join_decomposed",
    "join_device_sdpa",
    "opaque_sites",
    "open_multihead",
    "peel_repeat_kv",
    "prove_mask",
]
