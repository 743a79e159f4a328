"""Random calls of the quantized and selecting native kernels, compared with the definitions.

They are drawn and laid out as those of block-sparse attention. The oracle of attention is that of block-sparse
attention in fp64, on the numbers that the integers stand for.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from support.native_bounds import quantized_bound
from support.native_cases import Case
from torch import Tensor

from sparseattn.attn_ops.blocks import topk
from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.kernels.cpu import quantized
from sparseattn.attn_ops.kernels.cpu.native import quantized as native
from sparseattn.attn_ops.kernels.cpu.native import selection
from sparseattn.attn_ops.numerics.block_rounding import round_qk
from sparseattn.attn_ops.numerics.quantize import GRANULARITIES, GROUPS, mean_scores, quantize_int8, quantize_qk
from sparseattn.attn_ops.reference import block_sparse as reference


def check_quantized(library: ctypes.CDLL, drawn: Case) -> None:
    """Assert that integers, attention to lists and attention to all keys are those of the definitions."""
    case = replace(drawn, key_sizes=False)
    call = case.call()
    q, k, v, lists = call.q, call.k, call.v, call.lists
    smooth_k, granularity = case.seed % 2 == 0, GRANULARITIES[case.seed % 3]

    blocks = {"block_q": lists.block_q, "block_k": lists.block_k}
    modes = {"smooth_k": smooth_k, "causal": call.causal}
    out, lse = quantized.on_lists(library, q, k, v, lists.index, lists.count, scale=call.scale, **blocks, **modes)
    rounded = round_qk(q, k, **blocks, **modes)
    numbers = [_numbers(*pair) for pair in ((rounded.q, rounded.q_scale), (rounded.k, rounded.k_scale))]
    _check_attention(case, numbers, rounded.k_mean, lists, out, lse)

    whole = BlockIndex.from_mask(
        torch.ones(1, 1, 1, 1, dtype=torch.bool),
        block_q=case.seq[0],
        block_k=case.seq[1],
        seq_q=q.shape[2],
        seq_k=k.shape[2],
    )
    options = {"granularity": granularity, "smooth_k": smooth_k}
    out, lse = quantized.dense(library, q, k, v, causal=call.causal, scale=call.scale, **options)
    qk = quantize_qk(q, k, **options)
    numbers = [_numbers(*pair) for pair in ((qk.q, qk.q_scale), (qk.k, qk.k_scale))]
    _check_attention(case, numbers, qk.k_mean, whole, out, lse)


def check_rounding(library: ctypes.CDLL, case: Case) -> None:
    """Assert that integers and scales are those of `quantize_int8`, bit for bit, with and without a mean."""
    k = case.call().k
    mean = k.float().mean(dim=2, keepdim=True)
    for granularity in GRANULARITIES:
        for groups, taken in zip(GROUPS[granularity], (None, mean), strict=True):
            got = native.rounded(library, k, groups, mean=taken, along=mean)
            integers, scales = quantize_int8(k if taken is None else k.float() - taken, groups)
            assert torch.equal(got.integers[..., : case.dim], integers)
            assert not got.integers[..., case.dim :].any()
            assert torch.equal(got.scales, scales)
            assert torch.equal(got.sums, integers.sum(dim=-1, dtype=torch.int32))
            assert got.products is not None
            torch.testing.assert_close(got.products, (k.float() * mean).sum(dim=-1), rtol=1e-5, atol=1e-5)


def check_selection(library: ctypes.CDLL, case: Case) -> None:
    """Assert that means, lists and counts are those of `topk`; scores have ties, NaN and infinities."""
    call = case.call()
    block = case.blocks[1]
    means = selection.block_mean(library, call.k, block, None)
    torch.testing.assert_close(means, topk.block_mean(call.k, block), rtol=1e-5, atol=1e-6)

    shape = case.batch, case.kv_heads, case.seq[0], case.blocks[0]
    scores = (2 * torch.randn(shape)).round()
    for value in (torch.nan, torch.inf, -torch.inf):
        scores.masked_fill_(torch.rand(shape) < 0.1, value)
    for keep in (case.group, torch.randint(-1, shape[3] + 2, (shape[1], 1))):
        for allowed in (None, torch.rand(shape[2:]) < case.density):
            for got, wanted in zip(
                selection.top_k_blocks(library, scores, keep, allowed),
                topk.top_k_blocks(scores, keep, allowed),
                strict=True,
            ):
                assert torch.equal(got, wanted)
    weights = scores.nan_to_num(0, 1, -1).softmax(dim=-1)
    for mass in (torch.rand(shape[1], 1), torch.tensor(0.0), torch.tensor(1.0)):
        assert torch.equal(selection.count_to_mass(library, weights, mass), topk.count_to_mass(weights, mass))


def _numbers(integers: Tensor, scale: Tensor) -> Tensor:
    return integers.double() * scale.double().unsqueeze(-1)


def _check_attention(
    case: Case, qk: list[Tensor], k_mean: Tensor | None, lists: BlockIndex, out: Tensor, lse: Tensor
) -> None:
    call = case.call()
    v = call.v.double() if call.v.dtype is torch.bfloat16 else call.v.half().double()
    modes = {"block_q": lists.block_q, "block_k": lists.block_k, "causal": call.causal, "scale": call.scale}
    exact, exact_lse = reference.block_sparse_attention(*qk, v, lists.index, lists.count, None, **modes)
    magnitude, _ = reference.block_sparse_attention(*qk, v.abs(), lists.index, lists.count, None, **modes)
    assert (out.dtype, out.stride()) == (call.q.dtype, torch.empty_like(call.q).stride())
    error = float((out.double() - exact).abs().sum())
    allowed = quantized_bound(replace(call, lists=lists), exact, magnitude)
    assert error <= allowed < torch.inf, f"out: {error / allowed:.3g} of what is allowed"
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    if k_mean is not None:
        exact_lse = exact_lse + mean_scores(call.q, k_mean, call.scale)
    torch.testing.assert_close(lse[~empty].double(), exact_lse[~empty].double(), rtol=1e-5, atol=2e-5)
