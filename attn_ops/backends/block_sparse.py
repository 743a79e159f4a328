"""block_sparse: attention of every block of queries to a list of key blocks. Sparse methods reduce to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, ops

from .. import hopper
from ..blocks.block_index import check_block_lists
from ..checks import check_integers, check_qkv, default_scale
from ..errors import ArgumentError
from ..op import define_op
from ..resolve import AUTO, backward_kernel, forward_kernel
from ..spec import TRITON, BackendSpec, Provider, Support, later
from ..vendors import fastvideo_kernel

if TYPE_CHECKING:
    pass

NAME, OP = "block_sparse", "block_sparse_attention"
_FUSED_BACKWARD = (
    "its gradient of q is another in its last bits every run, those of q and k in bf16 are off by up to 0.013 where "
    "the softmax is nearly one-hot (triton: 0.0035), and its speed is not measured yet: chosen only where it is named"
)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None = None,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which block i of queries sees the key blocks block_index[..., i, :block_count[..., i]] only.

    Block i of queries holds tokens i * block_q ... (i + 1) * block_q - 1, block j of keys tokens j * block_k ...; the
    last block of either may be short, nq = ceil(Sq / block_q), nk = ceil(Sk / block_k). `BlockIndex` builds such
    lists from a mask. Their contents are trusted: reading them to check would wait for the device.

    Args:
        q: (B, Hq, Sq, D) fp32, fp16 or bf16; any strides with unit stride on D.
        k: (B, Hkv, Sk, D), Hq a multiple of Hkv; query head h reads head h // (Hq / Hkv).
        v: (B, Hkv, Sk, D).
        block_index: (B or 1, Hq or 1, nq, width) int32, numbers in 0 ... nk - 1, ascending and unique up to the count;
            what follows is ignored.
        block_count: (B or 1, Hq or 1, nq) int32, at most width; 0 for a block of queries that sees nothing.
        key_sizes: (nk,) int32, valid tokens of every key block, its first ones; None means all.
        block_q: tokens per block of queries, at least 1.
        block_k: tokens per block of keys, at least 1.
        causal: of the listed keys, query i sees 0 ... i, token by token, aligned top-left.
        scale: factor on the scores; None means D ** -0.5.
        provider: "triton", "cpu", "fastvideo_kernel", "reference", or "auto": the first of these that can serve it.
            Never chosen so: "gluon" and "gluon_overlapped", kernels for Hopper, and "triton_descriptors", none of
            which is measured yet, and "triton_fused_backward", which is not deterministic.

    Returns:
        out: (B, Hq, Sq, D), q's dtype and stride order. A row that sees no key is 0.
        lse: (B, Hq, Sq) fp32, natural logarithm of the softmax denominator; -inf for a row that sees no key.

    Raises:
        ArgumentError: on wrong shapes, dtypes or strides.
        UnsupportedError: if no provider can serve the call; the message lists the reasons.

    Differentiable in q, k and v through out and lse; double backward and forward mode are refused.
    """
    result: tuple[Tensor, Tensor] = ops.sparseattn.block_sparse_attention(
        *(q, k, v, block_index, block_count, key_sizes),
        block_q=block_q,
        block_k=block_k,
        causal=causal,
        scale=scale,
        provider=provider,
    )
    return result


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None = None,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,  # noqa: ARG001  (one signature for the op's kernels)
    scale: float | None = None,  # noqa: ARG001
    provider: str = AUTO,  # noqa: ARG001
) -> None:
    check_qkv(OP, q, k, v)
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        if block < 1:
            raise ArgumentError(OP, name, "be at least 1", block)
    for name, tensor in (("block_index", block_index), ("block_count", block_count), ("key_sizes", key_sizes)):
        if tensor is not None:
            check_integers(OP, name, tensor, q.device)
    blocks = -(-q.shape[2] // block_q), -(-k.shape[2] // block_k)
    check_block_lists(OP, block_index, block_count, key_sizes, blocks)
    for dim, what in enumerate(("batch", "heads")):
        if block_index.shape[dim] not in (1, q.shape[dim]):
            raise ArgumentError(OP, "block_index", f"have {what} 1 or q's {q.shape[dim]}", tuple(block_index.shape))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block_count: Tensor,
    key_sizes: Tensor | None = None,
    *,
    block_q: int,
    block_k: int,
    causal: bool = False,
    scale: float | None = None,
    provider: str = AUTO,
) -> tuple[Tensor, Tensor]:
    lists = block_index, block_count, key_sizes
    _check(q, k, v, *lists, block_q=block_q, block_k=block_k)
    scale = default_scale(scale, q.shape[-1])
    kernel = forward_kernel(NAME, provider, q, k, causal=causal, scale=scale, block_q=block_q, block_k=block_k)
    result: tuple[Tensor, Tensor] = kernel(
        q, k, v, *lists, block_q=block_q, block_k=block_k, causal=causal, scale=scale
    )
    return result


def _backward(
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
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float | None,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v from what the forward returned for the same arguments.

    In half precision `out` need only be near that: a rounded one gives no exact gradient, so that providers compute
    sum(grad_out * out) from the weights.
    """
    kernel = backward_kernel(NAME, provider, q, k, causal=causal, block_q=block_q, block_k=block_k)
    grads: tuple[Tensor, Tensor, Tensor] = kernel(
        *(grad_out, grad_lse, out, lse, q, k, v, block_index, block_count, key_sizes),
        block_q=block_q,
        block_k=block_k,
        causal=causal,
        scale=default_scale(scale, q.shape[-1]),
    )
    return grads


define_op(
    OP,
    "Tensor block_index, Tensor block_count, Tensor? key_sizes=None, *, int block_q, int block_k, bool causal=False, "
    "float? scale=None, str provider='auto'",
    forward=_forward,
    backward=_backward,
    check=_check,
)

BACKEND = BackendSpec(
    name=NAME,
    op=OP,
    kind="sparse",
    summary="attention to listed key blocks; what other sparse methods reduce to",
    selectable=False,
    tolerance={"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3},
    providers=(
        Provider(
            "triton",
            "pointer kernel for sm_80 and newer",
            load=later("kernels.triton.block_sparse", "attention"),
            load_backward=later("kernels.triton.block_sparse_backward", "attention_backward"),
            support=TRITON,
            detail=later("kernels.triton.tuned_tiles", "detail"),
        ),
        Provider(
            "cpu",
            "C++ kernel compiled on first use, else gathered blocks through PyTorch's CPU flash kernel",
            load=later("kernels.cpu.block_sparse", "attention"),
            load_backward=later("kernels.cpu.block_sparse", "attention_backward"),
            support=Support(devices=("cpu",)),
            detail=later("kernels.cpu.native.library", "detail"),
        ),
        fastvideo_kernel.PROVIDER,
        *hopper.providers(
            lambda function: later("kernels.gluon.block_sparse", function),
            later("kernels.triton.block_sparse_backward", "attention_backward"),
        ),
        Provider(
            "triton_descriptors",
            "the kernels of triton, the forward's keys and values copied by descriptor where aligned to 16 bytes",
            load=later("kernels.triton.block_sparse", "attention_by_descriptors"),
            load_backward=later("kernels.triton.block_sparse_backward", "attention_backward"),
            support=hopper.SUPPORT,
            why_not=hopper.why_not_descriptors,
            only_if_named=hopper.UNMEASURED,
        ),
        Provider(
            "triton_fused_backward",
            "the forward of triton, and one backward kernel for Hopper",
            load=later("kernels.triton.block_sparse", "attention"),
            load_backward=later("kernels.triton.block_sparse_fused_backward", "attention_backward"),
            support=hopper.SUPPORT,
            why_not=hopper.why_not_tiles,
            only_if_named=_FUSED_BACKWARD,
        ),
        Provider(
            "reference",
            "plain PyTorch, the definition",
            load=later("reference.block_sparse", "block_sparse_attention"),
            load_backward=later("reference.block_sparse", "block_sparse_attention_backward"),
        ),
    ),
)
