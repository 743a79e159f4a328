"""The function of every op in standard operators, against PyTorch: each parameter, tails, GQA, both outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.onnx_runs import largest_tensor, model_of, recorded, run
from torch import Tensor

from sparseattn import BlockIndex
from sparseattn.attn_ops.errors import UnsupportedError
from sparseattn.attn_ops.numerics.quantize import quantize_qk
from sparseattn.lowering.onnx.translations import OPS

B, HQ, HKV, DIM = 2, 4, 2, 32
GRID = (4, 5, 8)
TILE = {"grid": GRID, "tile": (2, 3, 4)}
RATIOS = torch.tensor([0.1, 0.5, 0.9, 1.0])
ROUNDED = {"provider": "reference"}  # another provider may keep what the op rounds
BLOCKS = {"block_q": 32, "block_k": 16}


def _qkv(seq_q: int, seq_k: int | None = None) -> dict[str, Tensor]:
    seq_k = seq_q if seq_k is None else seq_k
    return {
        "q": torch.randn(B, HQ, seq_q, DIM),
        "k": torch.randn(B, HKV, seq_k, DIM),
        "v": torch.randn(B, HKV, seq_k, DIM),
    }


def _lists(seq_q: int, seq_k: int, block_q: int, block_k: int) -> dict[str, Tensor]:
    mask = torch.rand(B, HQ, -(-seq_q // block_q), -(-seq_k // block_k)) < 0.4
    mask[0, 0, 0] = False  # a block of queries that sees nothing
    lists = BlockIndex.from_mask(mask, block_q=block_q, block_k=block_k, seq_q=seq_q, seq_k=seq_k)
    ignored = torch.arange(lists.index.shape[-1]) >= lists.count.unsqueeze(-1)
    return {"block_index": lists.index.masked_fill(ignored, 9999), "block_count": lists.count}


def _projection() -> dict[str, Tensor]:
    return {"weight": torch.randn(DIM, DIM), "bias": torch.randn(DIM)}


def _block_sparse(**more: Any) -> tuple[str, dict[str, Any]]:
    return "block_sparse_attention", {
        **_qkv(200, 137),
        **_lists(200, 137, 32, 48),
        "block_q": 32,
        "block_k": 48,
        **more,
    }


def _topk(**more: Any) -> tuple[str, dict[str, Any]]:
    return "block_topk_attention", {**_qkv(200), "keep_ratio": 0.4, **BLOCKS, **more}


def _sage(**more: Any) -> tuple[str, dict[str, Any]]:
    return "sage_attention", {**_qkv(200), **ROUNDED, **more}


def _sage_quantized(**more: Any) -> tuple[str, dict[str, Any]]:
    given = _qkv(200)
    qk = quantize_qk(given["q"], given["k"], granularity="per_thread", smooth_k=True)
    scales = {"q_scale": qk.q_scale, "k_scale": qk.k_scale}
    return "sage_attention_quantized", {**given, "q": qk.q, "k": qk.k, **scales, **ROUNDED, **more}


def _fp4(**more: Any) -> tuple[str, dict[str, Any]]:
    return "sage_fp4_attention", {**_qkv(200), **more}


def _sla(**more: Any) -> tuple[str, dict[str, Any]]:
    return "sparse_linear_attention", {**_qkv(200), **BLOCKS, **more}


def _sage_sla(**more: Any) -> tuple[str, dict[str, Any]]:
    return "sage_sparse_linear_attention", {**_qkv(200), **BLOCKS, **ROUNDED, **more}


def _sparge(**more: Any) -> tuple[str, dict[str, Any]]:
    return "sparge_attention", {**_qkv(200), **BLOCKS, **ROUNDED, **more}


def _map(**more: Any) -> tuple[str, dict[str, Any]]:
    return "sparge_block_map", {name: x for name, x in _qkv(200).items() if name != "v"} | BLOCKS | more


def _sta(text: int = 0, **more: Any) -> tuple[str, dict[str, Any]]:
    return "sliding_tile_attention", {**_qkv(160 + text), **TILE, "text_tokens": text, "window": (1, 1, 1), **more}


def _vsa(text: int = 0, **more: Any) -> tuple[str, dict[str, Any]]:
    return "video_sparse_attention", {**_qkv(160 + text), **TILE, "text_tokens": text, "sparsity": 0.6, **more}


def _vmoba(**more: Any) -> tuple[str, dict[str, Any]]:
    return "vmoba_attention", {**_qkv(160), "grid": GRID, "chunk": (2, 3, 4), **more}


def _flash(seq_k: int = 200, **more: Any) -> tuple[str, dict[str, Any]]:
    return "flash_attention", {**_qkv(200, seq_k), **more}


PER_HEAD = (1, 3, 1, 3, 3, 3, 1, 1, 1, 3, 1, 3)
PLACES = 2 * 2 * 2 * 24

EXACT = {
    "flash": lambda: _flash(),
    "flash cross": lambda: _flash(137, scale=0.3),
    "flash causal": lambda: _flash(causal=True),
    "flash causal cross": lambda: _flash(137, causal=True),
    "flash window": lambda: _flash(causal=True, window=70),
    "block_sparse": lambda: _block_sparse(),
    "block_sparse causal": lambda: _block_sparse(causal=True, scale=0.3),
    "block_sparse sizes": lambda: _block_sparse(key_sizes=torch.tensor([48, 0, 7], dtype=torch.int32)),
    "topk": lambda: _topk(),
    "topk causal": lambda: _topk(causal=True),
    "topk wide blocks": lambda: _topk(causal=True, block_q=16, block_k=64),
    "topk tensor": lambda: _topk(keep_ratios=RATIOS),
    "topk tensor causal": lambda: _topk(keep_ratios=RATIOS, causal=True),
    "sla": lambda: _sla(),
    "sla all": lambda: _sla(**_projection()),
    "sla complement": lambda: _sla(**_projection(), variant="complement", feature_map="elu"),
    "sla relu compat": lambda: _sla(weight=torch.randn(DIM, DIM), feature_map="relu", compat=True),
    "sla tensor": lambda: _sla(**_projection(), variant="complement", keep_ratios=RATIOS),
    "sta": lambda: _sta(),
    "sta text": lambda: _sta(13, text_first=True, text_length=7, window=(3, 1, 3)),
    "sta per head": lambda: _sta(13, window=PER_HEAD),
    "sta tensor": lambda: _sta(13, windows=torch.tensor(PER_HEAD)),
    "sta tiled": lambda: _sta(tiled=True, **_qkv(PLACES)),
    "vsa": lambda: _vsa(),
    "vsa gate": lambda: _vsa(gate=torch.randn(B, HQ, 160, DIM)),
    "vsa text": lambda: _vsa(13, text_first=True),
    "vsa tensor": lambda: _vsa(13, sparsities=RATIOS),
    "vsa tiled": lambda: _vsa(tiled=True, **_qkv(PLACES), gate=torch.randn(B, HQ, PLACES, DIM)),
    "vsa cross": lambda: _vsa(kv_grid=(2, 4, 4), **_qkv(160, 32)),
    "vmoba": lambda: _vmoba(),
    "vmoba frames": lambda: _vmoba(chunk=(2, 0, 0), topk=1, compat=True),
    "vmoba tokens": lambda: _vmoba(chunk_tokens=48, topk=2),
    "vmoba overall": lambda: _vmoba(threshold_type="overall"),
    "vmoba packed": lambda: _vmoba(threshold_type="head_global", compat=True),
    **{
        f"vmoba threshold {group} {compat}": lambda group=group, compat=compat: _vmoba(
            select="threshold", threshold_type=group, compat=compat
        )
        for group in ("query_head", "block", "overall", "head_global")
        for compat in (False, True)
    },
    "map": lambda: _map(mass=0.5),
    "map causal": lambda: _map(causal=True, similarity=0.2, sink=True),
}

QUANTIZED = {
    "sage": lambda: _sage(),
    "sage causal": lambda: _sage(causal=True),
    "sage 4 bits": lambda: _sage(granularity="per_block", bits=4),
    "sage smooth_q": lambda: _sage(granularity="per_warp", smooth_q=True, smooth_k=False),
    "sage asymmetric": lambda: _sage(asymmetric=True, smooth_v=True),
    "sage fp8": lambda: _sage(pv="fp8", smooth_v=True),
    "sage quantized": lambda: _sage_quantized(causal=True),
    "sage quantized fp8": lambda: _sage_quantized(pv="fp8", smooth_v=True, scale=0.3),
    "fp4": lambda: _fp4(),
    "fp4 plain causal": lambda: _fp4(smooth_q=False, smooth_k=False, two_level=False, causal=True),
    "sage_sla": lambda: _sage_sla(**_projection()),
    "sage_sla fp8": lambda: _sage_sla(**_projection(), variant="complement", pv="fp8", smooth_k=False),
    "sparge": lambda: _sparge(),
    "sparge causal": lambda: _sparge(causal=True, sink=True),
    "sparge mass": lambda: _sparge(mass=0.6, similarity=0.2),
    "sparge fp8": lambda: _sparge(pv="fp8", smooth_k=False, mass=1.0),
    "sparge fp8 causal": lambda: _sparge(pv="fp8", causal=True, mass=0.5),
    "sparge skip": lambda: _sparge(pv_threshold=1.0, keep_ratio=1.0),
    "sparge skip causal": lambda: _sparge(pv_threshold=1.0, keep_ratio=1.0, causal=True),
    "sparge tensors": lambda: _sparge(keep_ratios=RATIOS, similarities=RATIOS * 0.3, pv_thresholds=RATIOS * 5),
    "sparge masses": lambda: _sparge(masses=RATIOS),
}


def _call(op: str, given: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    return recorded(lambda: getattr(torch.ops.sparseattn, op)(**given))


def test_every_op_has_a_case() -> None:
    assert {build()[0] for build in (EXACT | QUANTIZED).values()} == set(OPS)


@pytest.mark.parametrize("name", EXACT)
def test_body_equals_the_op(name: str) -> None:
    call, wanted = _call(*EXACT[name]())
    for got, want in zip(run(model_of(call, wanted), call.inputs), wanted, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_body_equals_the_op(name: str) -> None:
    """Weights that lie between two FP16 or FP8 numbers may go either way by the last bit of an exponential."""
    call, wanted = _call(*QUANTIZED[name]())
    out, lse = run(model_of(call, wanted), call.inputs)
    np.testing.assert_allclose(lse, wanted[1].numpy(), rtol=0, atol=5e-6)
    difference = np.abs(out - wanted[0].numpy())
    step = {"fp16": 2.0**-11, "fp8": 2.0**-4}[call.attributes.get("pv", "fp8")]
    assert difference.max() <= step * float(call.inputs["v"].abs().max())
    assert difference.mean() <= 1e-6
    assert np.mean(difference.max(axis=-1) > 1e-4) <= 0.01  # rows with such a weight


@pytest.mark.parametrize("opset", [18, 22, 24])
@pytest.mark.parametrize("name", ["flash", "topk causal", "sla complement", "vmoba"])
def test_other_opsets(name: str, opset: int) -> None:
    call, wanted = _call(*EXACT[name]())
    for got, want in zip(run(model_of(call, wanted, opset), call.inputs), wanted, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_without_lse_is_the_operator_attention(causal: bool) -> None:
    call, wanted = _call(*_flash(137, causal=causal))
    model = model_of(call, wanted[:1])
    assert "Attention" in {node.op_type for node in model.functions[0].node}
    np.testing.assert_allclose(run(model, call.inputs)[0], wanted[0].numpy(), rtol=0, atol=5e-6)
    older = model_of(call, wanted[:1], opset=22)
    np.testing.assert_allclose(run(older, call.inputs)[0], wanted[0].numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "build", [_flash, _topk, _sla, lambda **seq: _sparge(causal=True, **seq)], ids=["flash", "topk", "sla", "sparge"]
)
def test_one_model_serves_every_batch_and_length(build: Any) -> None:
    call, wanted = _call(*build())
    model = model_of(call, wanted)
    for batch, seq in ((1, 64), (3, 129), (1, 331)):
        sizes = {"q": HQ, "k": HKV, "v": HKV}
        given = {name: torch.randn(batch, heads, seq, DIM) for name, heads in sizes.items()}
        other, want = _call(build()[0], build()[1] | given)
        out, lse = run(model, other.inputs)
        np.testing.assert_allclose(out, want[0].numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(lse, want[1].numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["block_sparse", "topk", "sla", "sparge", "sta", "vsa", "vmoba", "window"])
def test_sparse_bodies_never_hold_all_scores(name: str, tmp_path: Path) -> None:
    """No operation makes half as many numbers as the scores of all pairs."""
    grid, seq = (8, 16, 16), 2048
    q, k, v = (torch.randn(1, 2, seq, 16) for _ in range(3))
    blocks = {"block_q": 64, "block_k": 64}
    video: dict[str, Any] = {"grid": grid, "tile": (4, 4, 4)}
    index = torch.arange(4, dtype=torch.int32).expand(1, 1, 32, 4)
    lists = {"block_index": index, "block_count": torch.full((1, 1, 32), 4, dtype=torch.int32)}
    op, given = {
        "block_sparse": ("block_sparse_attention", {**lists, **blocks}),
        "topk": ("block_topk_attention", {"keep_ratio": 0.1, **blocks}),
        "sla": ("sparse_linear_attention", {"weight": torch.randn(16, 16), "variant": "complement", **blocks}),
        "sparge": ("sparge_attention", {"mass": 0.3, **blocks}),
        "sta": ("sliding_tile_attention", {"window": (1, 3, 3), **video}),
        "vsa": ("video_sparse_attention", {"gate": torch.randn_like(q), **video}),
        "vmoba": ("vmoba_attention", {"grid": grid, "chunk": (2, 8, 8)}),
        "window": ("flash_attention", {"causal": True, "window": 128}),
    }[name]
    call, wanted = _call(op, {"q": q, "k": k, "v": v, **given})
    assert largest_tensor(model_of(call, wanted), call.inputs, tmp_path) < seq * seq // 2


def test_half_precision_is_computed_in_single() -> None:
    op, given = _topk()
    halves = {name: x.half() if isinstance(x, Tensor) else x for name, x in given.items()}
    call, wanted = _call(op, halves)
    out, lse = run(model_of(call, wanted), call.inputs)
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, wanted[0].numpy(), rtol=0, atol=2e-3)
    np.testing.assert_allclose(lse, wanted[1].numpy(), rtol=0, atol=1e-5)


def test_compat_selection_of_halves_is_refused() -> None:
    op, given = _sla(compat=True)
    halves = {name: x.half() if isinstance(x, Tensor) else x for name, x in given.items()}
    with pytest.raises(UnsupportedError, match=r"compat must be False for torch.float16.*Pass compat=False"):
        _call(op, halves)


def test_fp8_needs_its_opset() -> None:
    call, wanted = _call(*_sage(pv="fp8"))
    with pytest.raises(UnsupportedError, match=r"FP8 .* needs opset 19 or newer, got 18"):
        model_of(call, wanted, opset=18)


def test_what_an_option_does_not_need_is_not_in_the_body() -> None:
    plain, wanted = _call(*_fp4(smooth_q=False, smooth_k=False))
    smooth, _ = _call(*_fp4())
    sizes = [len(model_of(call, wanted).functions[0].node) for call in (plain, smooth)]
    assert sizes[0] < sizes[1]
