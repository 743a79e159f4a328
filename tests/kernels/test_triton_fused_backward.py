"""The fused backward of block-sparse attention for Hopper: against the definition in fp64, compiled, who gets it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest
import torch
from support.block_sparse_cases import Case, inputs, lists
from support.triton_aot import SHARED_LIMIT, CompiledKernel, gpu
from support.triton_interpreter import interpret, why_not_interpret
from support.triton_launches import launch_fused_backward
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseattn.attn_ops.backends.block_sparse import BACKEND, block_sparse_attention
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import UnsupportedError
from sparseattn.attn_ops.kernels.triton import block_sparse
from sparseattn.attn_ops.kernels.triton.block_sparse_backward import attention_backward as split_backward
from sparseattn.attn_ops.kernels.triton.block_sparse_fused_backward import attention_backward
from sparseattn.attn_ops.reference import block_sparse as reference
from sparseattn.attn_ops.resolve import backward_kernel, forget_choices, forward_kernel

# Of a key that does not exist, weights are computed and thrown away.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
interpreted = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
NAME = "triton_fused_backward"
BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Case(blocks=(64, 64), head_dim=64, dtype=BF16, scale=0.125)
MODES: dict[str, dict[str, object]] = {
    "plain": {},
    "gqa_batch": {"heads": (4, 2), "batch": 2, "seq": (64, 192)},
    "tails": {"heads": (4, 1), "seq": (100, 77)},
    "causal_tails": {"causal": True, "seq": (250, 190)},
    "causal_gqa": {"causal": True, "heads": (2, 1), "seq": (192, 192)},
    "key_sizes_tails": {"sizes": True, "seq": (100, 177), "density": 0.8},
    "key_sizes_causal": {"sizes": True, "causal": True, "seq": (192, 192), "density": 0.8},
    "blocks_of_128_queries": {"blocks": (128, 64), "heads": (2, 1), "seq": (200, 130), "density": 0.8},
    "causal_blocks_of_128_queries": {"blocks": (128, 64), "causal": True, "seq": (300, 300), "density": 0.8},
    "one_short_block": {"seq": (5, 7), "density": 1.0},
    "all_empty": {"density": 0.0},
    "negative_scale": {"scale": -0.125, "sizes": True, "seq": (128, 192), "density": 0.8},
    "head_dim_128": {"head_dim": 128, "sizes": True, "seq": (100, 100), "heads": (2, 1)},
}
TOLERANCE = 5e-3
"""Relative L2 error of a gradient for inputs of a normal distribution, as of the split kernels."""
ROUNDED_DELTA = {BF16: 2e-2, FP16: 3e-3}
"""Of 4 and 16 times such inputs: little but the rounding of out is left of dP - delta. Measured 1.3e-2 and 1.5e-3."""


def errors(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    grad_out: Tensor | None = None,
    *,
    through_lse: bool = True,
    sizes: Tensor | None = None,
    exact_out: bool = False,
) -> list[float]:
    """Relative L2 errors of the three gradients; with exact_out, for an out that is not rounded."""
    if case.sizes and sizes is None:
        sizes = torch.randint(0, case.blocks[1] + 1, (-(-case.seq[1] // case.blocks[1]),), dtype=torch.int32)
    grad_out = torch.randn_like(q) if grad_out is None else grad_out
    grad_lse = torch.randn(q.shape[:-1]) if through_lse else None
    options = {"block_q": case.blocks[0], "block_k": case.blocks[1], "causal": case.causal, "scale": case.scale}
    wide = *(x.double() for x in (q, k, v)), index.clamp(max=index.shape[-1] - 1), count, sizes
    exact = reference.block_sparse_attention(*wide, **options)
    grads = grad_out.double(), None if grad_lse is None else grad_lse.double()
    want = reference.block_sparse_attention_backward(*grads, *exact, *wide, **options)
    with interpret():
        out, lse = block_sparse.attention(q, k, v, index, count, sizes, **options)
        given = exact[0].float() if exact_out else out, lse, q, k, v, index, count, sizes
        got = attention_backward(grad_out, grad_lse, *given, **options)
    for grad, x in zip(got, (q, k, v), strict=True):
        assert (grad.dtype, grad.stride()) == (x.dtype, torch.empty_like(x).stride())
    assert not got[0][exact[1] == -torch.inf].any()
    return [float((g.double() - w).norm()) / max(float(w.norm()), 1e-30) for g, w in zip(got, want, strict=True)]


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_definition(mode: str, dtype: torch.dtype) -> None:
    case = dataclasses.replace(SMALL, dtype=dtype, **MODES[mode])
    given = *inputs(case), *lists(case, case.batch, case.heads[0])
    assert max(errors(case, *given, through_lse=dtype == BF16)) <= TOLERANCE


@interpreted
@pytest.mark.parametrize("through_lse", [False, True], ids=["out", "out_and_lse"])
@pytest.mark.parametrize("size", [4.0, 16.0])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_sharp_attention(dtype: torch.dtype, size: float, through_lse: bool) -> None:
    """The softmax is nearly one-hot: the gradients are as good as the rounding of out, and it is all that is off."""
    case = Case((4, 1), (100, 140), (64, 64), 1, 64, dtype, through_lse, not through_lse, 0.125, 0.7)
    q, k, v = ((size * x.float()).to(dtype) for x in inputs(case))
    given, grad_out = (q, k, v, *lists(case, 1, 4)), torch.randn_like(q)
    sizes = torch.tensor([50, 64, 7], dtype=torch.int32) if case.sizes else None
    rounded, exact = (
        errors(case, *given, grad_out, through_lse=through_lse, sizes=sizes, exact_out=exact) for exact in (False, True)
    )
    assert max(rounded) <= ROUNDED_DELTA[dtype]
    assert max(exact) <= TOLERANCE
    assert rounded[2] == exact[2]


@interpreted
def test_weights_of_padding_may_be_infinite() -> None:
    """A key that does not exist has score 0, and the others are so low that its weight would be."""
    case = dataclasses.replace(SMALL, seq=(64, 70), heads=(1, 1))
    q, k, v = 4 + 8 * torch.rand(1, 1, 64, 64), -8 * torch.rand(1, 1, 70, 64), torch.randn(1, 1, 70, 64)
    index, count = torch.tensor([[[[0, 1]]]], dtype=torch.int32), torch.tensor([[[2]]], dtype=torch.int32)
    given = q.to(BF16), k.to(BF16), v.to(BF16), index, count
    assert max(errors(case, *given, sizes=torch.tensor([3, 6], dtype=torch.int32), exact_out=True)) <= TOLERANCE


@interpreted
def test_padding_is_never_read_as_a_number() -> None:
    case = dataclasses.replace(SMALL, seq=(64, 128))
    q, k, v = inputs(case)
    given, sizes = lists(case, 1, 2), torch.tensor([20, 64], dtype=torch.int32)
    options = {"block_q": 64, "block_k": 64, "causal": False, "scale": 0.125}
    grad_out, runs = torch.randn_like(q), []
    with interpret():
        for padding in (0.0, torch.nan):
            k[:, :, 20:64], v[:, :, 20:64] = padding, padding
            results = block_sparse.attention(q, k, v, *given, sizes, **options)
            runs.append(attention_backward(grad_out, None, *results, q, k, v, *given, sizes, **options))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    for grad in runs[0][1:]:
        assert not grad[:, :, 20:64].any()


@interpreted
def test_strides_of_inputs_and_of_grad_out() -> None:
    case = dataclasses.replace(SMALL, batch=2, seq=(70, 70))
    packed = torch.randn(2, 70, 3, 2, 72).to(BF16)
    q, k, v = (tensor[..., :64].transpose(1, 2) for tensor in packed.unbind(2))
    given = q, k, v, *lists(case, 2, 2)
    for grad_out in (torch.randn(2, 70, 2, 64).transpose(1, 2), torch.randn(2, 2, 64, 70).mT, torch.randn(2, 2, 1, 1)):
        assert max(errors(case, *given, grad_out.to(BF16).expand(q.shape))) <= TOLERANCE


@interpreted
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 4)])
def test_lists_are_broadcast(batch: int, heads: int) -> None:
    case = dataclasses.replace(SMALL, heads=(4, 2), batch=2)
    index, count = lists(case, batch, heads)
    assert max(errors(case, *inputs(case), index.mT.contiguous().mT, count)) <= TOLERANCE


@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 8), (8, 0)])
def test_nothing_to_compute(seq_q: int, seq_k: int) -> None:
    q, k = (torch.randn(1, 2, seq, 64).to(BF16) for seq in (seq_q, seq_k))
    index = torch.zeros(1, 1, -(-seq_q // 64), -(-seq_k // 64), dtype=torch.int32)
    given = q, None, q, q[..., 0].float(), q, k, k, index, index.sum(-1, dtype=torch.int32)
    grads = attention_backward(*given, block_q=64, block_k=64, causal=False, scale=1.0)
    torch.testing.assert_close(grads, tuple(map(torch.zeros_like, (q, k, k))), rtol=0, atol=0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def empty_backward() -> None:
    q, index = torch.empty(0, 2, 8, 64), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    options = {"block_q": 64, "block_k": 64, "causal": False, "scale": 1.0}
    attention_backward(q, None, q, q[..., 0], q, q, q, index, index[..., 0], **options)


@pytest.mark.usefixtures("deterministic")
def test_refuses_where_only_deterministic_algorithms_are_allowed() -> None:
    with pytest.raises(UnsupportedError, match='Name the provider "triton"'):
        empty_backward()


@pytest.mark.usefixtures("deterministic")
def test_warns_where_a_warning_is_enough() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="in another order every run"):
        empty_backward()


@pytest.mark.parametrize(("block_q", "masked"), [(64, False), (64, True), (128, True)])
@pytest.mark.parametrize(("head_dim", "programs"), [(64, 2), (128, 1)])
def test_compiled(head_dim: int, programs: int, block_q: int, masked: bool) -> None:
    with gpu(90) as kernels:
        launch_fused_backward(head_dim, block_q, masked, (250, 256) if masked else (256, 256))
    assert [kernel.name for kernel in kernels] == ["_prepare", "_mark", "_list_rows", "fused_kernel"]
    assert all(kernel.spilled == 0 for kernel in kernels), kernels
    fused = kernels[-1]
    assert fused.shared <= SHARED_LIMIT[90]
    assert fused.programs_per_sm == programs
    assert fused.matrix_instructions.keys() == {"HGMMA"}
    assert additions(fused) == {"UTMAREDG"}
    assert fused.launches == [(2 * 4, 1, 1)]


def additions(kernel: CompiledKernel) -> set[str]:
    """The instructions that add to global memory, by copy engine or by thread."""
    return set(re.findall(r"\b(?:UTMAREDG|REDG?|ATOMG?)\b", kernel.sass))


def test_one_kernel_for_every_length_and_number_of_heads() -> None:
    with gpu(90) as kernels:
        for heads in (4, 16):
            for seq in ((1, 75), (16, 26), (100, 110), (1000, 523)):
                launch_fused_backward(64, 64, True, seq, heads)
    assert [len(kernel.launches) for kernel in kernels] == [8] * 4


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Capability, "current", lambda _device: Capability.of("sm90"))
    forget_choices()
    yield
    forget_choices()


@pytest.mark.usefixtures("hopper")
def test_only_its_name_chooses_it() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 2, 128, 64, dtype=BF16, device="cuda")
    blocks = {"block_q": 64, "block_k": 64}
    served = {
        name: [choose("block_sparse", name, q, q, **blocks) for choose in (forward_kernel, backward_kernel)]
        for name in ("auto", "triton", NAME)
    }
    split = [block_sparse.attention, split_backward]
    assert served == {"auto": split, "triton": split, NAME: [block_sparse.attention, attention_backward]}


@pytest.mark.usefixtures("hopper")
def test_the_backward_op_refuses_blocks_that_it_has_not() -> None:
    q, index = torch.randn(1, 2, 96, 64, dtype=BF16), torch.zeros(1, 1, 3, 3, dtype=torch.int32)
    given = q, None, q, q[..., 0].float(), q, q, q, index, index[..., 0], None
    with pytest.raises(UnsupportedError, match="blocks of 32 keys, it has 64"):
        torch.ops.sparseattn.block_sparse_attention_backward(*given, 32, 32, False, None, NAME)


@interpreted
@pytest.mark.usefixtures("hopper")
def test_gradients_through_the_op() -> None:
    case = dataclasses.replace(SMALL, causal=True)
    index, count = lists(case, 1, 2)
    tensors = [x.requires_grad_() for x in inputs(case)]
    options = {"block_q": 64, "block_k": 64, "causal": True}
    with interpret():
        out, lse = block_sparse_attention(*tensors, index, count, **options, provider=NAME)
        grad_out = torch.randn_like(out)
        got = torch.autograd.grad(out, tensors, grad_out)
        given = *(x.detach() for x in (out, lse, *tensors)), index, count
        want = attention_backward(grad_out, None, *given, **options, scale=0.125)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("machine", "change", "reason"),
    [
        ("sm90", {}, None),
        ("sm90", {"causal": True, "needs_grad": True, "params": (("block_q", 128), ("block_k", 64))}, None),
        ("sm90", {"dtype": torch.float32}, "dtype float32, not float16 or bfloat16"),
        ("sm90", {"head_dim": 96}, "head_dim 96, not 64 or 128"),
        ("sm90", {"params": (("block_q", 96), ("block_k", 64))}, "blocks of 96 queries, it has multiples of 64"),
        ("sm100", {}, "its kernel is for sm90, this is sm100 (B200)"),
    ],
)
def test_what_it_needs(machine: str, change: dict[str, object], reason: str | None) -> None:
    call = AttentionCall(1, 4, 2, 256, 256, 64, BF16, "cuda")
    reasons = BACKEND.provider(NAME).reasons(dataclasses.replace(call, **change), Capability.of(machine))
    assert reasons == ([] if reason is None else [reason])
