"""How far the native kernel may be from the definition: what the roundings of its arithmetic add up to.

Roundings mostly average, and a few eps of a sum of magnitudes are enough. Where tokens are alike they do not. A sum of
n terms that all grow it rounds n times, every time by up to half an eps of what is there so far: n / 4 eps of its end.
Products of 64 queries and 64 keys are summed apart, so n is the number of these, and of the terms of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.native_cases import Call
from torch import Tensor

from sparseattn.attn_ops.heads import per_kv_head, per_query_head
from sparseattn.attn_ops.kernels.cpu.native import build
from sparseattn.attn_ops.reference import block_sparse as reference

EPS = torch.finfo(torch.float32).eps
GROWTH = EPS / 4  # of the end of a sum, for each addition
IN_FLOATS = 5e-7  # of a sum of magnitudes
IN_PAIRS = 2**-11  # 5 of 8 weights are rounded to bf16, the others to twice its digits
IN_BF16 = 2**-10  # all weights are; twice that where all keys, thus all weights, are alike
CANCELLED = 2 * EPS  # of dot products that cancel in a gradient of scores: where tokens are few nothing averages
SIDE = 64  # queries of a panel, and keys of a step


def forward_bound(call: Call, exact: Tensor, magnitude: Tensor) -> float:
    """For the sum of absolute errors; `magnitude` is the result with absolute values."""
    return _forward_bound(call, IN_PAIRS if _in_pairs(call) else IN_FLOATS, exact, magnitude)


def quantized_bound(call: Call, exact: Tensor, magnitude: Tensor) -> float:
    """Likewise, with integer scores: in pairs, all weights are bf16."""
    pairs = call.v.dtype == torch.bfloat16 and _has_pairs()
    return _forward_bound(call, _in_bf16(call) if pairs else IN_FLOATS, exact, magnitude)


def _forward_bound(call: Call, relative: float, exact: Tensor, magnitude: Tensor) -> float:
    within = relative * float(magnitude.sum()) + GROWTH * _over_keys(call) * float(exact.abs().sum())
    return _rounded(call, within, float(_rounding(call, exact).abs().sum()))


def gradient_bounds(
    call: Call, exact: Sequence[Tensor], grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> list[float]:
    """For the norms of the errors of the gradients of q, k and v; everything is the definition's, in fp64."""
    relative = _in_bf16(call) if _in_pairs(call) else IN_FLOATS
    # A gradient may vanish (one key alone has weight 1): what it is a sum of is as large as this.
    terms = max(1.0, abs(call.scale) * call.q.shape[3] ** 0.5) * float(grad_out.norm())
    of_weights = EPS * float(lse.masked_fill(lse == -torch.inf, 0).abs().max())  # lse is rounded, thus every weight
    additions = _over_keys(call), _over_queries(call), _over_queries(call)
    bounds = []
    for x, number, lost in zip(exact, additions, (*_cancelled(call, grad_out, grad_lse, out, lse), 0.0), strict=True):
        norm = float(x.norm())
        within = relative * (norm + terms) + (GROWTH * number + of_weights) * norm + lost
        bounds.append(_rounded(call, within, float(_rounding(call, x).norm())))
    return bounds


def _cancelled(call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[float, float]:
    """What may be left in the gradients of q and k of terms that cancel.

    A gradient of a score is weight * (grad_out . v - grad_out . out + grad_lse); out errs as the sum over keys it is.
    """
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    heads = q.shape[1]
    allowed = reference.allowed_tokens(call.lists, call.causal)
    scores = (call.scale * (q @ per_query_head(k, heads).mT)).masked_fill(~allowed, -torch.inf)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0)  # a row with no key is inf - inf
    of_keys = grad_out.abs() @ per_query_head(v.abs(), heads).mT
    of_row = (weights * of_keys).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        of_row += grad_lse.abs().unsqueeze(-1)
    of_out = GROWTH * _over_keys(call) * (grad_out * out).abs().sum(dim=-1, keepdim=True)
    of_scores = abs(call.scale) * weights * (CANCELLED * (of_keys + of_row) + of_out)
    of_k = per_kv_head(of_scores.mT @ q.abs(), k.shape[1])
    return float((of_scores @ per_query_head(k.abs(), heads)).norm()), float(of_k.norm())


def _has_pairs() -> bool:
    return build.instruction_set() == "avx512_bf16"


def _in_pairs(call: Call) -> bool:
    return call.q.dtype == torch.bfloat16 and call.q.shape[3] % 2 == 0 and _has_pairs()


def _in_bf16(call: Call) -> float:
    return IN_BF16 * (2 if call.scale == 0 or call.k.stride(2) == 0 else 1)


def _over_keys(call: Call) -> int:
    """The additions of a sum over the keys of a query."""
    count = call.lists.count
    return _additions(call.lists.block_k, call.lists.seq_k, int(count.max()) if count.numel() else 0)


def _over_queries(call: Call) -> int:
    """The additions of a sum over the queries of a key."""
    lists, group = call.lists, call.q.shape[1] // call.k.shape[1]
    return _additions(lists.block_q, lists.seq_q, group * -(-lists.seq_q // lists.block_q))


def _additions(block: int, seq: int, blocks: int) -> int:
    block = min(block, seq)
    return min(block, SIDE) + blocks * -(-block // SIDE)


def _rounding(call: Call, exact: Tensor) -> Tensor:
    """What the dtype of the result alone costs."""
    return exact.to(call.q.dtype).double() - exact


def _rounded(call: Call, within: float, rounding: float) -> float:
    """The bound of a result that is rounded to the dtype, from within that of the exact one.

    The number next to it is no further from it than the number next to the exact one: hence twice.
    """
    return within if call.q.dtype == torch.float32 else rounding + 2 * within
