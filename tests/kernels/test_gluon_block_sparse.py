"""The Hopper kernels of block-sparse attention against their definition, in the emulator."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.block_sparse_cases import Case, inputs, lists
from support.gluon_emulator import emulate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseattn import Capability
from sparseattn.attn_ops.backends.block_sparse import BACKEND
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.kernels.gluon.block_sparse import attention
from sparseattn.attn_ops.kernels.triton.block_sparse import attention as triton_attention
from sparseattn.attn_ops.reference.block_sparse import block_sparse_attention
from sparseattn.attn_ops.resolve import forget_choices, forward_kernel

SCHEDULES = pytest.mark.parametrize("overlapped", [False, True], ids=["one_buffer", "overlapped"])
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative L2 error of the output; the reference rounds once, the kernel rounds the weights too."""

BF16 = Case(dtype=torch.bfloat16, head_dim=64, blocks=(64, 64), seq=(128, 192))
MODES = {
    "plain": BF16,
    "fp16": dataclasses.replace(BF16, dtype=torch.float16),
    "head_dim_128": dataclasses.replace(BF16, head_dim=128),
    "gqa_batch": dataclasses.replace(BF16, heads=(4, 2), batch=2),
    "short_tails": dataclasses.replace(BF16, seq=(150, 205)),
    "key_sizes": dataclasses.replace(BF16, sizes=True),
    "key_sizes_short_tails": dataclasses.replace(BF16, sizes=True, seq=(70, 100), heads=(2, 1)),
    "128_rows": dataclasses.replace(BF16, blocks=(128, 64), seq=(256, 320), head_dim=128),
    "128_rows_short_tails": dataclasses.replace(BF16, blocks=(128, 64), seq=(300, 130), sizes=True),
    "192_rows": dataclasses.replace(BF16, blocks=(192, 64), seq=(250, 130)),
    "one_short_block": dataclasses.replace(BF16, seq=(5, 7), density=1.0),
    "long_lists": dataclasses.replace(BF16, seq=(64, 1000), density=1.0, heads=(1, 1)),
    "all_empty": dataclasses.replace(BF16, density=0.0),
    "negative_scale": dataclasses.replace(BF16, scale=-0.3, sizes=True),
    "zero_scale": dataclasses.replace(BF16, scale=0.0, sizes=True),
}


def check(case: Case, overlapped: bool, q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor) -> None:
    sizes = torch.randint(0, case.blocks[1] + 1, (-(-case.seq[1] // case.blocks[1]),), dtype=torch.int32)
    args = (q, k, v, index, count, sizes if case.sizes else None)
    options = {"block_q": case.blocks[0], "block_k": case.blocks[1], "causal": False, "scale": case.scale}
    with emulate():
        out, lse = attention(*args, **options, overlapped=overlapped)
    want, want_lse = block_sparse_attention(q, k, v, index.clamp(max=index.shape[-1] - 1), *args[4:], **options)
    assert (out.dtype, out.stride()) == (q.dtype, torch.empty_like(q).stride())
    assert (lse.dtype, lse.is_contiguous()) == (torch.float32, True)
    error = (out.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    assert error < TOLERANCE[case.dtype]
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert torch.equal(out[lse == -torch.inf], torch.zeros_like(out[lse == -torch.inf]))
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=0)


@SCHEDULES
@pytest.mark.parametrize("case", MODES.values(), ids=MODES.keys())
def test_equals_the_definition(case: Case, overlapped: bool) -> None:
    check(case, overlapped, *inputs(case), *lists(case, case.batch, case.heads[0]))


@SCHEDULES
def test_strided_inputs_give_the_querys_strides(overlapped: bool) -> None:
    case = dataclasses.replace(BF16, batch=2, seq=(64, 64))
    packed = torch.randn(2, 64, 3, 2, 72).bfloat16()
    q, k, v = (tensor[..., :64].transpose(1, 2) for tensor in packed.unbind(2))
    check(case, overlapped, q, k, v, *lists(case, 2, 2))
    q = torch.randn(2, 64, 2, 64).bfloat16().transpose(1, 2)
    check(case, overlapped, q, k, v, *lists(case, 2, 2))


def test_rows_that_the_copy_engine_cannot_address_are_copied() -> None:
    case = dataclasses.replace(BF16, heads=(2, 2), seq=(64, 64))
    packed = torch.randn(3, 1, 2, 64, 68).bfloat16()[..., 4:]
    check(case, False, *packed.unbind(0), *lists(case, 1, 2))
    one_for_all = torch.randn(1, 1, 64, 64).bfloat16().expand(1, 2, 64, 64)
    check(case, False, packed[0], one_for_all, one_for_all, *lists(case, 1, 2))


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 2)])
def test_lists_are_broadcast(batch: int, heads: int) -> None:
    case = dataclasses.replace(BF16, batch=2)
    index, count = lists(case, batch, heads)
    check(case, False, *inputs(case), index, count)
    check(case, True, *inputs(case), index.mT.contiguous().mT, count)


@SCHEDULES
def test_padding_is_never_read_as_a_number(overlapped: bool) -> None:
    q, k, v = inputs(BF16)
    given = *lists(BF16, 1, 2), torch.tensor([20, 64, 0], dtype=torch.int32)
    options = {"block_q": 64, "block_k": 64, "causal": False, "scale": 0.2, "overlapped": overlapped}
    with emulate():
        want = attention(q, k, v, *given, **options)
        for x in (k, v):
            x[:, :, 20:64], x[:, :, 128:] = torch.nan, torch.nan
        got = attention(q, k, v, *given, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_inputs_stay_as_they_were() -> None:
    args = (*inputs(BF16), *lists(BF16, 1, 2))
    before = [tensor.clone() for tensor in args]
    check(dataclasses.replace(BF16, scale=-0.5, sizes=True), True, *args)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(args, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 8, 64), (1, 2, 0, 64)])
def test_nothing_to_compute(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape).bfloat16()
    index = torch.zeros(1, 1, -(-shape[2] // 64), 1, dtype=torch.int32)
    out, lse = attention(q, q, q, index, index[..., 0], block_q=64, block_k=64, causal=False, scale=1.0)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:-1])


def test_only_its_name_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capability, "current", lambda _device: Capability.of("sm90"))
    forget_choices()
    with FakeTensorMode():
        q = torch.empty(1, 2, 128, 64, dtype=torch.bfloat16, device="cuda")
    served = {name: forward_kernel("block_sparse", name, q, q, block_q=64, block_k=64) for name in ("auto", "gluon")}
    forget_choices()
    assert served == {"auto": triton_attention, "gluon": attention}


@pytest.mark.parametrize("name", ["gluon", "gluon_overlapped"])
@pytest.mark.parametrize(
    ("machine", "change", "reason"),
    [
        ("sm90", {}, None),
        ("sm90", {"params": (("block_q", 128), ("block_k", 64))}, None),
        ("sm90", {"needs_grad": True}, None),
        ("sm90", {"dtype": torch.float32}, "dtype float32, not float16 or bfloat16"),
        ("sm90", {"head_dim": 96}, "head_dim 96, not 64 or 128"),
        ("sm90", {"causal": True}, "causal attention is not supported"),
        ("sm90", {"params": (("block_q", 96), ("block_k", 64))}, "blocks of 96 queries, it has multiples of 64"),
        ("sm90", {"params": (("block_q", 64), ("block_k", 128))}, "blocks of 128 keys, it has 64"),
        ("sm100", {}, "its kernel is for sm90, this is sm100 (B200)"),
        ("sm89", {}, "its kernel is for sm90, this is sm89 (RTX 40, L40)"),
    ],
)
def test_what_it_needs(name: str, machine: str, change: dict[str, object], reason: str | None) -> None:
    call = AttentionCall(1, 4, 2, 256, 256, 64, torch.bfloat16, "cuda")
    reasons = BACKEND.provider(name).reasons(dataclasses.replace(call, **change), Capability.of(machine))
    assert reasons == ([] if reason is None else [reason])
