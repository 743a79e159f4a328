"""Adapters to vendor packages, against fakes of the packages' functions that check how they are called."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import PACKAGES, Capability
from sparseattn.attn_ops.errors import ArgumentError, UnsupportedError
from sparseattn.attn_ops.reference.attention import masked_attention, token_mask
from sparseattn.attn_ops.vendors import (
    PROVIDERS,
    fastvideo_kernel,
    flash_attn,
    sageattention,
    spas_sage_attn,
    stream,
)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    return masked_attention(q, k, v, token_mask(q.shape[2], k.shape[2], causal=causal), scale)


def inputs(seq_q: int = 128, seq_k: int = 128, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as a model makes them: (B, S, H, D), transposed."""
    shapes = ((1, seq_q, 4, 64), (1, seq_k, 2, 64), (1, seq_k, 2, 64))
    q, k, v = (torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes)
    return q, k + 3, v


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))


def pretend_sm(monkeypatch: pytest.MonkeyPatch, module: Any, sm: int) -> None:
    monkeypatch.setattr(module, "Capability", SimpleNamespace(current=lambda _device: Capability.of(f"sm{sm}")))


def a_call(**changes: Any) -> AttentionCall:
    call: dict[str, Any] = {"batch": 1, "heads": 8, "kv_heads": 8, "seq_q": 4096, "seq_k": 4096, "head_dim": 64}
    return AttentionCall(**{**call, "dtype": torch.bfloat16, "device": "cuda", **changes})


def test_every_package_that_a_machine_may_have_is_listed() -> None:
    assert set(PROVIDERS) == set(PACKAGES) - {"triton"}
    for package, providers in PROVIDERS.items():
        for provider in providers:
            assert provider.support.package == package
            assert provider.install.startswith("pip install ")
            assert provider.load_backward is None
            assert "//" not in provider.install
            reasons = provider.reasons(a_call(), Capability.of("sm90"))
            assert f"{package} is not installed ({provider.install})" in reasons


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 32)])
def test_flash_attn(monkeypatch: pytest.MonkeyPatch, causal: bool, window: int | None) -> None:
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        return_attn_probs: bool = False,
    ) -> tuple[Tensor, Tensor, None]:
        assert (q.shape, k.shape) == ((1, 128, 4, 64), (1, 128, 2, 64))
        assert (dropout_p, return_attn_probs) == (0.0, True)
        left, right = window_size
        assert right == (0 if left >= 0 else -1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        allowed = token_mask(128, 128, causal=causal, window=left + 1 if left >= 0 else None)
        out, lse = masked_attention(q, k, v, allowed, softmax_scale or 0.0)
        return out.transpose(1, 2).contiguous(), lse, None

    install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    q, k, v = inputs()
    out, lse = flash_attn.load()(q, k, v, causal=causal, window=window, scale=0.2)
    want, want_lse = masked_attention(q, k, v, token_mask(128, 128, causal=causal, window=window), 0.2)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert out.stride() == q.stride()


def test_flash_attn_aligns_bottom_right() -> None:
    capability = Capability.of("sm90", {"flash_attn": "2.8.4"})
    assert flash_attn.PROVIDER.reasons(a_call(causal=True), capability) == []
    assert flash_attn.PROVIDER.reasons(a_call(causal=True, seq_k=77, kind="cross"), capability) == [
        "causal with 4096 queries and 77 keys (it aligns them bottom-right)"
    ]


class Sage:
    """The functions of sageattention 2.2, exact, with its lse; they record how they were called."""

    def __init__(self) -> None:
        self.called = ""
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, **common: Any) -> tuple[Tensor, Tensor]:
        assert (common["tensor_layout"], common["smooth_k"], common["return_lse"]) == ("HND", False, True)
        self.called, self.k, self.v = name, k, v
        out, lse = dense(q, k, v, common["sm_scale"], common["is_causal"])
        return out.contiguous(), lse

    def sageattn_qk_int8_pv_fp16_triton(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        quantization_backend: str = "triton",
        is_causal: bool = False,
        attn_mask: Tensor | None = None,
        sm_scale: float | None = None,
        smooth_k: bool = True,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert (quantization_backend, attn_mask) == ("triton", None)
        common = {"tensor_layout": tensor_layout, "is_causal": is_causal, "sm_scale": sm_scale}
        return self._attend("triton", q, k, v, **common, smooth_k=smooth_k, return_lse=return_lse)

    def sageattn_qk_int8_pv_fp16_cuda(
        self, q: Tensor, k: Tensor, v: Tensor, qk_quant_gran: str, pv_accum_dtype: str, **common: Any
    ) -> tuple[Tensor, Tensor]:
        assert pv_accum_dtype == "fp32"
        return self._attend(f"fp16 {qk_quant_gran}", q, k, v, **common)

    def sageattn_qk_int8_pv_fp8_cuda(
        self, q: Tensor, k: Tensor, v: Tensor, qk_quant_gran: str, pv_accum_dtype: str, **common: Any
    ) -> tuple[Tensor, Tensor]:
        assert pv_accum_dtype == "fp32+fp32"
        return self._attend(f"fp8 {qk_quant_gran}", q, k, v, **common)

    def sageattn_qk_int8_pv_fp8_cuda_sm90(
        self, q: Tensor, k: Tensor, v: Tensor, qk_quant_gran: str, pv_accum_dtype: str, **common: Any
    ) -> tuple[Tensor, Tensor]:
        assert pv_accum_dtype == "fp32+fp32"
        return self._attend(f"fp8 sm90 {qk_quant_gran}", q, k, v, **common)


FUNCTIONS = [name for name in vars(Sage) if name.startswith("sageattn")]


@pytest.mark.parametrize(
    ("sm", "granularity", "pv", "called"),
    [
        (80, "per_block", "fp16", "triton"),
        (80, "per_thread", "fp16", "fp16 per_thread"),
        (86, "per_warp", "fp16", "fp16 per_warp"),
        (89, "per_thread", "fp8", "fp8 per_thread"),
        (90, "per_thread", "fp16", "fp16 per_thread"),
        (90, "per_warp", "fp8", "fp8 sm90 per_warp"),
        (120, "per_thread", "fp8", "fp8 per_thread"),
    ],
)
def test_sageattention_calls_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, sm: int, granularity: str, pv: str, called: str
) -> None:
    fake = Sage()
    install(monkeypatch, "sageattention", **{name: getattr(fake, name) for name in FUNCTIONS})
    pretend_sm(monkeypatch, sageattention, sm)
    q, k, v = inputs()
    for causal, smooth_k, smooth_v in itertools.product((False, True), repeat=3):
        before = k.clone(), v.clone()
        arguments = {"causal": causal, "scale": 0.2, "granularity": granularity, "pv": pv}
        arguments |= {"smooth_k": smooth_k, "smooth_v": smooth_v}
        out, lse = sageattention.load()(q, k, v, **arguments)
        assert fake.called == called
        assert torch.equal(k, before[0])
        assert torch.equal(v, before[1])
        want, want_lse = dense(q, k, v, 0.2, causal)
        torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=5e-3)
        assert out.stride() == q.stride()
        assert lse.is_contiguous()
        assert fake.k is not None
        assert fake.v is not None
        assert (fake.k.float().mean(2).abs().max() < 1e-2) == smooth_k
        assert (fake.v.float().mean(2).abs().max() < 1e-2) == smooth_v


@pytest.mark.parametrize(
    ("sm", "params", "sentence"),
    [
        (
            89,
            {"granularity": "per_block", "pv": "fp8"},
            'has no kernel for granularity="per_block" with pv="fp8" on sm89',
        ),
        (
            120,
            {"granularity": "per_block", "pv": "fp16"},
            'has no kernel for granularity="per_block" with pv="fp16" on sm120',
        ),
        (86, {"granularity": "per_thread", "pv": "fp8"}, 'has no kernel for pv="fp8" on sm86'),
        (89, {"bits": 4}, "bits=4: its release has no INT4 kernel"),
        (89, {"smooth_q": True}, "smooth_q=True: it has no kernel for it"),
        (89, {"asymmetric": True}, "asymmetric=True: it has no kernel for it"),
    ],
)
def test_sageattention_says_what_it_cannot(sm: int, params: dict[str, Any], sentence: str) -> None:
    call = a_call(seq_k=64, params=tuple(params.items()))
    (reason,) = sageattention.PROVIDER.reasons(call, Capability.of(f"sm{sm}", {"sageattention": "2.2.0"}))
    assert reason == sentence


@pytest.mark.parametrize(
    ("machine", "version", "changes", "sentence"),
    [
        ("sm89", "2.2.0", {}, None),
        ("sm90", "2.1.1", {}, None),
        ("sm90", "2.2.0", {}, "uninitialised memory on sm90"),
        ("sm80", "1.0.6", {}, "needs sageattention 2.1, found 1.0.6"),
        ("sm100", "2.2.0", {}, "not for sm100"),
        ("sm89", "2.2.0", {"head_dim": 160}, "head_dim 160, not 1 to 128"),
        ("sm89", "2.2.0", {"dtype": torch.float32}, "dtype float32"),
        ("sm89", "2.2.0", {"causal": True, "seq_k": 77, "kind": "cross"}, "causal with 4096 queries and 77 keys"),
        ("sm89", "2.2.0", {"mask": "bool"}, "a bool mask is given"),
        ("sm89", "2.2.0", {"needs_grad": True}, "a gradient is needed and it has none"),
    ],
)
def test_sageattention_deny_list(machine: str, version: str, changes: dict[str, Any], sentence: str | None) -> None:
    reasons = sageattention.PROVIDER.reasons(a_call(**changes), Capability.of(machine, {"sageattention": version}))
    assert reasons == [] if sentence is None else any(sentence in reason for reason in reasons)


def test_a_side_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "side")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _device: "default")
    on_gpu: Any = SimpleNamespace(is_cuda=True, device="cuda:0")
    with (
        pytest.raises(UnsupportedError, match=r"CUDA-graph capture.*Use provider=\"triton\".*SageAttention/issues/392"),
        stream.on_default_stream("sageattention", on_gpu),
    ):
        pass


@pytest.mark.parametrize("adapter", [sageattention, spas_sage_attn])
def test_adapters_of_the_default_stream_ask_for_it_and_keep_the_device(
    monkeypatch: pytest.MonkeyPatch, adapter: Any
) -> None:
    """Those packages call torch.cuda.set_device and launch on the default stream, whichever is current."""
    inside: list[bool] = [False]

    @contextlib.contextmanager
    def device_of(_tensor: Tensor) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    def kernel(q: Tensor, *_args: Any, **_arguments: Any) -> Any:
        assert inside[0]
        return q if adapter is spas_sage_attn else (q, q[..., 0])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    names = {"block_sparse_sage2_attn_cuda": kernel, "sageattn_qk_int8_pv_fp16_triton": kernel}
    install(monkeypatch, adapter.PACKAGE, **names)
    pretend_sm(monkeypatch, adapter, 80)
    q, k, v = inputs()
    if adapter is spas_sage_attn:
        adapter.load()(q, k, v, torch.ones(1, 4, 1, 2, dtype=torch.bool), scale=0.2)
    else:
        adapter.load()(q, k, v, scale=0.2, granularity="per_block", pv="fp16", smooth_k=True)
    assert not inside[0]


def over_map(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, blocks: tuple[int, int], scale: float) -> Tensor:
    allowed = block_map.repeat_interleave(blocks[0], -2).repeat_interleave(blocks[1], -1)
    return masked_attention(q, k, v, allowed[..., : q.shape[2], : k.shape[2]], scale)[0]


@pytest.mark.parametrize("sm", [80, 90])
def test_spas_sage_attn(monkeypatch: pytest.MonkeyPatch, sm: int) -> None:
    blocks = (64, 128) if sm == 90 else (128, 64)

    def block_sparse_sage2_attn_cuda(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_id: Tensor,
        scale: float,
        smooth_k: bool,
        pvthreshd: float,
        tensor_layout: str,
    ) -> Tensor:
        assert (smooth_k, pvthreshd, tensor_layout) == (True, 1e6, "HND")
        assert mask_id.is_contiguous()
        out = over_map(q, k, v, mask_id, blocks, scale)
        sees_nothing = ~mask_id.any(-1).repeat_interleave(blocks[0], -1)[..., : q.shape[2]]
        return out.masked_fill(sees_nothing.unsqueeze(-1), torch.nan).contiguous()

    install(monkeypatch, "spas_sage_attn", block_sparse_sage2_attn_cuda=block_sparse_sage2_attn_cuda)
    pretend_sm(monkeypatch, spas_sage_attn, sm)
    q, k, v = inputs(300, 400)
    block_map = torch.rand(1, 4, -(-300 // blocks[0]), -(-400 // blocks[1])) < 0.5
    block_map[0, 1, 0] = False
    out, lse = spas_sage_attn.load()(q, k, v, block_map.transpose(-1, -2).contiguous().transpose(-1, -2), scale=0.2)
    assert torch.equal(out, over_map(q, k, v, block_map, blocks, 0.2))
    assert not out[0, 1, : blocks[0]].any()
    assert out.stride() == q.stride()
    assert (lse.shape, lse.dtype) == ((1, 4, 300), torch.float32)
    assert lse.isnan().all()
    with pytest.raises(ArgumentError, match="block_map must be"):
        spas_sage_attn.load()(q, k, v, block_map[..., :-1], scale=0.2)


@pytest.mark.parametrize(
    ("machine", "changes", "sentence"),
    [
        ("sm89", {}, None),
        ("sm100", {}, "not for sm100"),
        ("sm89", {"head_dim": 96}, "head_dim 96, not 64 or 128"),
        ("sm89", {"seq_q": 1, "kind": "cross"}, "1 queries, its kernel takes 128 or more"),
        ("sm89", {"causal": True}, "causal attention is not supported"),
        ("sm89", {"dtype": torch.float32}, "dtype float32"),
    ],
)
def test_spas_sage_attn_deny_list(machine: str, changes: dict[str, Any], sentence: str | None) -> None:
    reasons = spas_sage_attn.PROVIDER.reasons(a_call(**changes), Capability.of(machine, {"spas_sage_attn": "0.1.0"}))
    assert reasons == [] if sentence is None else any(sentence in reason for reason in reasons)


def block_sparse_attn_sm90(
    q: Tensor, k: Tensor, v: Tensor, q2k_idx: Tensor, q2k_num: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Stand in for the package's Hopper kernel: its demands, its lse, and NaN where it would read beyond a list."""
    assert q.shape[0] == 1
    assert q.shape[2] % 64 == 0
    assert k.shape[2] == 64 * sizes.numel()
    assert all(tensor.is_contiguous() for tensor in (q, k, v, q2k_idx, q2k_num, sizes))
    assert {q2k_idx.dtype, q2k_num.dtype, sizes.dtype} == {torch.int32}
    assert q2k_idx.shape[:3] == q2k_num.shape == (1, q.shape[1], q.shape[2] // 64)
    assert (q2k_num >= 1).all()
    allowed = torch.zeros(1, q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool)
    for head, row in itertools.product(range(q.shape[1]), range(q.shape[2] // 64)):
        for block in q2k_idx[0, head, row, : q2k_num[0, head, row]].tolist():
            allowed[0, head, row * 64 : row * 64 + 64, block * 64 : block * 64 + int(sizes[block])] = True
    out, lse = masked_attention(q, k, v, allowed, q.shape[-1] ** -0.5)
    no_key = ~allowed.any(-1, keepdim=True)
    return out.masked_fill(no_key, torch.nan), (lse * -math.sqrt(q.shape[-1])).unsqueeze(-1).masked_fill(
        no_key, torch.nan
    )


@pytest.mark.parametrize(("seq_q", "seq_k"), [(256, 256), (200, 130), (64, 300)])
@pytest.mark.parametrize("given_sizes", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_fastvideo_kernel(
    monkeypatch: pytest.MonkeyPatch, seq_q: int, seq_k: int, given_sizes: bool, shared: bool
) -> None:
    install(monkeypatch, "fastvideo_kernel.block_sparse_attn", block_sparse_attn_sm90=block_sparse_attn_sm90)
    monkeypatch.setitem(sys.modules, "fastvideo_kernel", SimpleNamespace())
    q, k, v = inputs(seq_q, seq_k, torch.bfloat16)
    nq, nk = -(-seq_q // 64), -(-seq_k // 64)
    mask = torch.rand(1, 1 if shared else 4, nq, nk) < 0.6
    mask[0, 0, 0] = False
    count = mask.sum(-1, dtype=torch.int32)
    index = torch.argsort(~mask, dim=-1, stable=True).to(torch.int32)
    # What follows a list means nothing, and may be no block at all.
    index = torch.where(torch.arange(nk) < count.unsqueeze(-1), index, 10_000).to(torch.int32)
    sizes = (seq_k - 64 * torch.arange(nk)).clamp(max=64).to(torch.int32)
    if given_sizes:
        sizes[0] = 0
    out, lse = fastvideo_kernel.load()(
        *(q, k, v, index, count, sizes if given_sizes else None), block_q=64, block_k=64, scale=64**-0.5
    )
    tokens = torch.arange(64) < sizes.unsqueeze(-1)
    allowed = (mask.repeat_interleave(64, -2).repeat_interleave(64, -1) & tokens.flatten())[..., :seq_q, :seq_k]
    want, want_lse = masked_attention(q, k, v, allowed, 64**-0.5)
    # The fake sums over padded keys too, so a bf16 may round the other way.
    torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert not out[0, 0, :64].any()
    assert out.stride() == q.stride()


@pytest.mark.parametrize(
    ("machine", "changes", "sentence"),
    [
        ("sm90", {}, None),
        ("sm90", {"kv_heads": 2}, None),
        ("sm100", {}, "its kernel is for sm90, this is sm100"),
        ("sm90", {"batch": 2}, "batch 2, its kernel takes 1"),
        ("sm90", {"head_dim": 96}, "head_dim 96, not 64 or 128"),
        ("sm90", {"dtype": torch.float16}, "dtype float16, not bfloat16"),
        ("sm90", {"causal": True}, "causal attention is not supported"),
        ("sm90", {"needs_grad": True}, "a gradient is needed and it has none"),
        ("sm90", {"params": (("block_q", 64), ("block_k", 64)), "scale": 0.125}, None),
        ("sm90", {"params": (("block_q", 128), ("block_k", 128))}, "blocks of 128 x 128, it has 64 x 64"),
        ("sm90", {"scale": 0.2}, "scale 0.2, it has head_dim ** -0.5 only"),
    ],
)
def test_fastvideo_kernel_deny_list(machine: str, changes: dict[str, Any], sentence: str | None) -> None:
    reasons = fastvideo_kernel.PROVIDER.reasons(
        a_call(**changes), Capability.of(machine, {"fastvideo_kernel": "0.3.2"})
    )
    assert reasons == [] if sentence is None else any(sentence in reason for reason in reasons)
