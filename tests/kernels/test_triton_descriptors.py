"""Block-sparse attention whose keys and values are copied by descriptor: bit for bit what pointers give."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from support.block_sparse_cases import MODES, Case, inputs, lists
from support.triton_aot import SHARED_LIMIT, gpu
from support.triton_interpreter import interpret, why_not_interpret
from support.triton_launches import launch_block_sparse
from support.triton_limits import committed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseattn.attn_ops.backends.block_sparse import BACKEND
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.kernels.triton import block_sparse
from sparseattn.attn_ops.kernels.triton.block_sparse_backward import attention_backward
from sparseattn.attn_ops.kernels.triton.descriptors import addressable
from sparseattn.attn_ops.resolve import backward_kernel, forget_choices, forward_kernel

interpreted = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())
NAME, DESCRIPTORS = "triton_descriptors", "block_sparse descriptors"
BF16, FP16 = torch.bfloat16, torch.float16
WHOLE_TILES = [name for name, case in MODES.items() if case.blocks[1] % 16 == 0]


def results(case: Case, *given: Tensor, sizes: Tensor | None = None, descriptors: bool) -> tuple[Tensor, Tensor]:
    """out and lse, and descriptors are made if and only if they are to be."""
    options = {"block_q": case.blocks[0], "block_k": case.blocks[1], "causal": case.causal, "scale": case.scale}
    made = mock.patch.object(block_sparse, "descriptor", wraps=block_sparse.descriptor)
    with interpret(), made as descriptor:
        result = block_sparse.attention(*given, sizes, **options, descriptors=descriptors)
    assert descriptor.call_count == 2 * descriptors
    return result


def same(case: Case, *given: Tensor, sizes: Tensor | None = None) -> None:
    want, got = (results(case, *given, sizes=sizes, descriptors=descriptors) for descriptors in (False, True))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("mode", WHOLE_TILES)
def test_equals_pointers(mode: str) -> None:
    case = dataclasses.replace(MODES[mode], dtype=BF16 if len(mode) % 2 else FP16)
    sizes = torch.randint(0, case.blocks[1] + 1, (-(-case.seq[1] // case.blocks[1]),), dtype=torch.int32)
    same(case, *inputs(case), *lists(case, case.batch, case.heads[0]), sizes=sizes if case.sizes else None)


@interpreted
@pytest.mark.parametrize("head_dim", [8, 40, 128])
def test_head_dims(head_dim: int) -> None:
    case = Case(head_dim=head_dim, seq=(64, 140), blocks=(64, 64), dtype=BF16, density=0.9)
    same(case, *inputs(case), *lists(case, 1, 2))


@interpreted
def test_strides() -> None:
    """Heads side by side in every token, as models have them, and a batch that repeats."""
    case = Case(batch=2, seq=(70, 70), dtype=BF16)
    q, k, v = (x.transpose(1, 2) for x in torch.randn(2, 70, 3, 2, 32).to(BF16).unbind(2))
    same(case, q, k[:1].contiguous().expand(2, -1, -1, -1).clone(), v, *lists(case, 2, 2))


@interpreted
def test_rows_that_are_not_aligned_go_by_pointers() -> None:
    case = Case(head_dim=20, seq=(64, 64), dtype=BF16)
    given = *inputs(case), *lists(case, 1, 2)
    assert not addressable(given[1])
    options = {"block_q": 32, "block_k": 32, "causal": False, "scale": case.scale}
    with interpret(), mock.patch.object(block_sparse, "descriptor", side_effect=AssertionError):
        got = block_sparse.attention(*given, **options, descriptors=True)
    torch.testing.assert_close(got, results(case, *given, descriptors=False), rtol=0, atol=0)


def test_what_the_copy_engine_can_address() -> None:
    x = torch.zeros(2, 3, 40, 32, dtype=BF16)
    assert addressable(x)
    assert addressable(x.transpose(1, 2))
    assert addressable(x[:1, :1, :, :16])
    assert not addressable(x[..., 1:])
    assert not addressable(x[:1].expand(2, -1, -1, -1))
    assert not addressable(x.mT)
    assert not addressable(torch.zeros(2, 3, 40, 36, dtype=BF16))


@interpreted
def test_padding_is_never_read_as_a_number() -> None:
    case = Case(seq=(64, 64), dtype=BF16)
    q, k, v = inputs(case)
    given, sizes = lists(case, 1, 2), torch.tensor([20, 32], dtype=torch.int32)
    want = results(case, q, k, v, *given, sizes=sizes, descriptors=True)
    k[:, :, 20:32], v[:, :, 20:32] = torch.nan, torch.nan
    got = results(case, q, k, v, *given, sizes=sizes, descriptors=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arch", "head_dim", "masked", "loads"),
    [(90, 64, True, {"UTMALDG", "LDGSTS"}), (100, 128, False, {"UTMALDG"})],
)
def test_compiled(arch: int, head_dim: int, masked: bool, loads: set[str]) -> None:
    """The masked blocks at the edge keep their pointers."""
    with gpu(arch) as kernels:
        launch_block_sparse(BF16, head_dim, 64, masked, descriptors=True)
    assert kernels[0].spilled == 0, kernels
    assert kernels[0].shared <= SHARED_LIMIT[arch]
    assert set(re.findall(r"\b(?:UTMALDG|LDGSTS)\b", kernels[0].sass)) == loads


@pytest.mark.parametrize("mode", ["", " causal"])
@pytest.mark.parametrize("of", ["sm90 D64", "sm90 D128", "sm100 D128"])
def test_they_save_registers(of: str, mode: str) -> None:
    copied, pointed = (committed()[1][f"{of} {kernel}{mode}"] for kernel in (DESCRIPTORS, "block_sparse"))
    assert copied["_forward 1"]["registers"] < pointed["_forward 1"]["registers"]


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
    served = {
        name: [
            choose("block_sparse", name, q, q, block_q=64, block_k=64) for choose in (forward_kernel, backward_kernel)
        ]
        for name in ("auto", NAME)
    }
    by_pointers = [block_sparse.attention, attention_backward]
    assert served == {"auto": by_pointers, NAME: [block_sparse.attention_by_descriptors, attention_backward]}


@pytest.mark.parametrize(
    ("machine", "change", "reason"),
    [
        ("sm90", {}, None),
        ("sm100", {"causal": True, "needs_grad": True, "head_dim": 96, "params": (("block_k", 48),)}, None),
        ("sm90", {"dtype": torch.float32}, "dtype float32, not float16 or bfloat16"),
        ("sm90", {"params": (("block_k", 40),)}, "blocks of 40 keys, it has multiples of 16"),
        ("sm89", {}, "it copies on sm90, sm100 and sm103, this is sm89 (RTX 40, L40)"),
    ],
)
def test_what_it_needs(machine: str, change: dict[str, object], reason: str | None) -> None:
    call = AttentionCall(1, 4, 2, 256, 256, 64, BF16, "cuda")
    reasons = BACKEND.provider(NAME).reasons(dataclasses.replace(call, **change), Capability.of(machine))
    assert reasons == ([] if reason is None else [reason])
