"""block_sparse_attention: the CPU path against the definition in every mode, and the contract of the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sparseattn.attn_ops.backends import block_sparse as backend
from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.errors import ArgumentError, UnsupportedError
from sparseattn.attn_ops.kernels.cpu import block_sparse as dispatcher
from sparseattn.attn_ops.kernels.cpu import gathered
from sparseattn.attn_ops.kernels.cpu.native.library import Kernel
from sparseattn.attn_ops.op import same_defaults
from sparseattn.attn_ops.reference import block_sparse as reference

OP = torch.ops.sparseattn.block_sparse_attention
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A shape and the kind of lists on it; every second row of blocks is random, one is empty, one is complete."""

    heads: int = 2
    kv_heads: int = 2
    seq_q: int = 64
    seq_k: int = 64
    block_q: int = 16
    block_k: int = 16
    causal: bool = False
    sizes: bool = False
    lists: tuple[int, int] = (2, 2)
    strided: bool = False
    scale: float | None = None

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((self.heads, self.seq_q), (self.kv_heads, self.seq_k), (self.kv_heads, self.seq_k))
        if self.strided:
            q, k, v = (torch.randn(2, tokens, heads, 32).to(dtype).transpose(1, 2) for heads, tokens in shapes)
        else:
            q, k, v = (torch.randn(2, heads, tokens, 32).to(dtype) for heads, tokens in shapes)
        return q, k, v

    def index(self) -> BlockIndex:
        blocks = -(-self.seq_q // self.block_q), -(-self.seq_k // self.block_k)
        mask = torch.rand(*self.lists, *blocks) < 0.4
        mask[:, :, 0] = True
        mask[:, 0, 1] = False
        sizes = torch.randint(0, self.block_k + 1, (blocks[1],), dtype=torch.int32) if self.sizes else None
        return BlockIndex.from_mask(
            mask,
            block_q=self.block_q,
            block_k=self.block_k,
            seq_q=self.seq_q,
            seq_k=self.seq_k,
            key_sizes=sizes,
        )


CASES = {
    "plain": Case(),
    "causal": Case(causal=True),
    "scale": Case(scale=0.3),
    "grouped heads": Case(heads=6, kv_heads=2, lists=(2, 6)),
    "one kv head": Case(heads=3, kv_heads=1, lists=(2, 3), causal=True),
    "cross": Case(seq_q=48, seq_k=112),
    "causal cross, more keys": Case(seq_q=48, seq_k=112, causal=True),
    "causal cross, more queries": Case(seq_q=112, seq_k=48, causal=True),
    "tails": Case(seq_q=59, seq_k=75),
    "causal tails": Case(seq_q=75, seq_k=75, causal=True),
    "tail of one token": Case(seq_q=65, seq_k=65, causal=True),
    "wide query blocks": Case(seq_q=70, seq_k=70, block_q=32, block_k=8, causal=True),
    "wide key blocks": Case(seq_q=70, seq_k=70, block_q=8, block_k=32, causal=True),
    "odd blocks": Case(seq_q=70, seq_k=64, block_q=11, block_k=7, causal=True),
    "key sizes": Case(sizes=True),
    "key sizes, causal, tails": Case(seq_q=75, seq_k=75, sizes=True, causal=True),
    "one list for all heads": Case(heads=4, kv_heads=2, lists=(1, 1), causal=True),
    "one list per head": Case(lists=(1, 2)),
    "one list per batch": Case(lists=(2, 1), seq_k=50),
    "strided": Case(strided=True, causal=True),
    "strided tails": Case(strided=True, seq_q=59, seq_k=75, sizes=True),
    "fewer tokens than a block": Case(seq_q=20, seq_k=5, block_q=16, block_k=64),
}


def call(q: Tensor, k: Tensor, v: Tensor, lists: BlockIndex, case: Case, **kwargs: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = OP(
        *(q, k, v, lists.index, lists.count, lists.key_sizes),
        block_q=case.block_q,
        block_k=case.block_k,
        causal=case.causal,
        scale=case.scale,
        **kwargs,
    )
    return result


def defined(lists: BlockIndex, case: Case) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Any]]:
    """The arguments of the reference after q, k and v."""
    scale = 32**-0.5 if case.scale is None else case.scale
    sizes = {"block_q": case.block_q, "block_k": case.block_k, "causal": case.causal, "scale": scale}
    return (lists.index, lists.count, lists.key_sizes), sizes


def distance(value: Tensor, exact: Tensor) -> float:
    """Relative L2 distance, absolute where the exact value is 0."""
    assert value.isfinite().all()
    return float((value.detach().double() - exact).norm() / exact.norm().clamp(min=1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", ["native", "gathered", "gathered block by block"])
def test_forward_and_backward(name: str, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "native":
        monkeypatch.setattr(dispatcher, "kernel", lambda: Kernel(None, path))
    if path == "gathered block by block":
        monkeypatch.setattr(gathered, "_BYTES_PER_THREAD", 1)
    case, tolerance = CASES[name], backend.BACKEND.tolerance[str(dtype).removeprefix("torch.")]
    lists, inputs = case.index(), case.inputs(dtype)
    arguments, sizes = defined(lists, case)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = call(*leaves, lists, case, provider="cpu")
    exact, exact_lse = reference.block_sparse_attention(*(x.double() for x in inputs), *arguments, **sizes)
    assert out.dtype is dtype
    assert out.stride() == torch.empty_like(inputs[0]).stride()
    assert (lse.dtype, lse.is_contiguous()) == (torch.float32, True)
    assert distance(out, exact) < tolerance
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert distance(lse[~empty], exact_lse[~empty]) < 1e-5

    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), leaves, (grad_out, grad_lse))
    exact_grads = reference.block_sparse_attention_backward(
        *(x.double() for x in (grad_out, grad_lse, exact, exact_lse, *inputs)), *arguments, **sizes
    )
    for grad, exact_grad, x in zip(grads, exact_grads, inputs, strict=True):
        assert grad.dtype is dtype
        assert grad.stride() == torch.empty_like(x).stride()
        assert distance(grad, exact_grad) < tolerance
    assert not grads[0][empty].any()


@pytest.mark.parametrize("name", ["plain", "causal tails", "one list for all heads"])
def test_gradient_through_out_alone(name: str) -> None:
    case = CASES[name]
    lists, inputs = case.index(), case.inputs()
    arguments, sizes = defined(lists, case)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, _ = call(*leaves, lists, case)
    exact, exact_lse = reference.block_sparse_attention(*(x.double() for x in inputs), *arguments, **sizes)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad_out)
    exact_grads = reference.block_sparse_attention_backward(
        grad_out.double(), None, exact, exact_lse, *(x.double() for x in inputs), *arguments, **sizes
    )
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert distance(grad, exact_grad) < 1e-5


def test_all_blocks_is_dense_attention() -> None:
    q, k, v = Case(seq_q=75, seq_k=75).inputs()
    lists = BlockIndex.from_mask(torch.ones(5, 5).bool(), block_q=16, block_k=16, seq_q=75, seq_k=75)
    for causal in (False, True):
        out, _ = OP(q, k, v, lists.index, lists.count, block_q=16, block_k=16, causal=causal)
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(out, exact)


def test_padding_after_the_count_is_ignored() -> None:
    case = CASES["causal tails"]
    lists, inputs = case.index(), [x.requires_grad_() for x in case.inputs()]
    used = torch.arange(lists.index.shape[-1]) < lists.count[..., None]
    results = []
    for padding in (0, 2**31 - 1, -1):
        index = torch.where(used, lists.index, padding).int()
        padded = BlockIndex(index, lists.count, 16, 16, 75, 75)
        out, lse = call(*inputs, padded, case)
        results.append((out, lse, *torch.autograd.grad(out.sum(), inputs)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 16), (2, 2, 0)])
def test_no_queries(shape: tuple[int, int, int]) -> None:
    batch, heads, tokens = shape
    q = torch.randn(batch, heads, tokens, 8, requires_grad=True)
    k = torch.randn(batch, heads, 16, 8, requires_grad=True)
    lists = BlockIndex.from_mask(torch.ones(-(-tokens // 16), 1).bool(), block_q=16, block_k=16, seq_q=tokens)
    out, lse = OP(q, k, k, lists.index, lists.count, block_q=16, block_k=16)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert not torch.autograd.grad(out.sum(), k)[0].any()


def test_empty_lists_give_zero_and_minus_infinity() -> None:
    q, k, v = (x.requires_grad_() for x in Case().inputs())
    index, count = torch.zeros(1, 1, 4, 0, dtype=torch.int32), torch.zeros(1, 1, 4, dtype=torch.int32)
    out, lse = OP(q, k, v, index, count, block_q=16, block_k=16)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("name", ["causal tails", "strided tails", "grouped heads"])
def test_inputs_are_not_modified(name: str) -> None:
    case = CASES[name]
    lists, inputs = case.index(), [x.requires_grad_() for x in case.inputs()]
    held = [x for x in (*inputs, lists.index, lists.count, lists.key_sizes) if x is not None]
    before = [x.detach().clone() for x in held]
    call(*inputs, lists, case)[0].sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))


@pytest.mark.parametrize("name", ["plain", "strided tails", "one list for all heads"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name: str, requires_grad: bool) -> None:
    case = CASES[name]
    lists, inputs = case.index(), [x.requires_grad_(requires_grad) for x in case.inputs()]
    kwargs = {"block_q": case.block_q, "block_k": case.block_k, "causal": case.causal, "scale": case.scale}
    torch.library.opcheck(OP.default, (*inputs, lists.index, lists.count, lists.key_sizes), kwargs)


def test_opcheck_of_the_backward() -> None:
    case = CASES["causal tails"]
    lists, inputs = case.index(), case.inputs()
    out, lse = call(*inputs, lists, case)
    rest = lists.index, lists.count, None, case.block_q, case.block_k, case.causal, None, "auto"
    args = torch.randn_like(out), torch.randn_like(lse), out, lse, *inputs, *rest
    torch.library.opcheck(torch.ops.sparseattn.block_sparse_attention_backward.default, args)


def test_defaults_are_those_of_the_schema() -> None:
    for function in (backend._forward, backend._check, backend.block_sparse_attention):
        assert same_defaults(OP.default, function) == []


def test_one_graph_serves_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(
        lambda *args: call(*args, Case(causal=True))[0], backend=counter, fullgraph=True, dynamic=True
    )
    for tokens in (64, 75, 130):
        case = Case(seq_q=tokens, seq_k=tokens, causal=True)
        lists, inputs = case.index(), [x.requires_grad_() for x in case.inputs()]
        out = attend(*inputs, lists)
        grads = torch.autograd.grad(out.sum(), inputs)
        eager = call(*inputs, lists, case)[0]
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(grads, torch.autograd.grad(eager.sum(), inputs))
    assert counter.frame_count == 1


def test_autocast_casts_q_k_and_v() -> None:
    case = CASES["causal tails"]
    lists, inputs = case.index(), case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = call(*inputs, lists, case)
    cast, cast_lse = call(*(x.bfloat16() for x in inputs), lists, case)
    assert torch.equal(out, cast)
    assert torch.equal(lse, cast_lse)


def test_another_default_device_does_not_matter() -> None:
    case = CASES["key sizes, causal, tails"]
    lists, inputs = case.index(), [x.requires_grad_() for x in case.inputs()]
    expected = call(*inputs, lists, case)[0]
    grads = torch.autograd.grad(expected.sum(), inputs)
    with torch.device("meta"):
        out = call(*inputs, lists, case)[0]
        again = torch.autograd.grad(out.sum(), inputs)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_the_reference_is_a_provider() -> None:
    case = CASES["key sizes, causal, tails"]
    lists, inputs = case.index(), [x.requires_grad_() for x in case.inputs()]
    results = []
    for provider in ("cpu", "reference"):
        out, lse = call(*inputs, lists, case, provider=provider)
        results.append((out, lse, *torch.autograd.grad(out.sum(), inputs)))
    torch.testing.assert_close(results[0], results[1])


def test_typed_wrapper() -> None:
    case = CASES["key sizes, causal, tails"]
    lists, inputs = case.index(), case.inputs()
    arguments, _ = defined(lists, case)
    out, lse = backend.block_sparse_attention(*inputs, *arguments, block_q=16, block_k=16, causal=True)
    expected = call(*inputs, lists, case)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"block_q": 0}, "block_q must be at least 1, got 0"),
        ({"block_k": -4}, "block_k must be at least 1, got -4"),
        ({"block_index": torch.zeros(1, 1, 4, 2)}, "block_index must be int32, got float32"),
        ({"block_count": torch.zeros(1, 1, 4).long()}, "block_count must be int32, got int64"),
        ({"block_index": torch.zeros(1, 1, 3, 2).int()}, r"block_index must be 4-D, \(batch or 1, heads or 1, 4 query"),
        ({"block_index": torch.zeros(1, 4, 2).int()}, "block_index must be 4-D"),
        ({"block_count": torch.zeros(1, 2, 4).int()}, r"block_count must have shape \(1, 1, 4\), got \(1, 2, 4\)"),
        ({"key_sizes": torch.zeros(3).int()}, "key_sizes must have one entry for each of the 4 key blocks"),
        (
            {"block_index": torch.zeros(1, 3, 4, 2).int(), "block_count": torch.zeros(1, 3, 4).int()},
            r"block_index must have heads 1 or q's 2, got \(1, 3, 4, 2\)",
        ),
        ({"q": torch.zeros(2, 64, 32)}, "q must be 4-D"),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_mistakes_are_named(change: dict[str, Any], sentence: str, fake: bool) -> None:
    q, k, v = Case().inputs()
    lists = torch.zeros(1, 1, 4, 2, dtype=torch.int32), torch.zeros(1, 1, 4, dtype=torch.int32)
    arguments = {"q": q, "k": k, "v": v, "block_index": lists[0], "block_count": lists[1]}
    arguments |= {"key_sizes": None, "block_q": 16, "block_k": 16, **change}
    if not fake:
        with pytest.raises(ArgumentError, match=sentence):
            OP(**arguments)
        return
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises(ArgumentError, match=sentence):
        OP(**{name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()})


def test_refusals() -> None:
    case = Case()
    with pytest.raises(UnsupportedError, match="triton: needs a cuda device, this is cpu"):
        call(*case.inputs(), case.index(), case, provider="triton")
