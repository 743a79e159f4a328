"""Programs as ONNX files: every op in both modes, what stays dynamic, real models, the report, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.onnx_runs import onnx, session
from support.zoo import ZOO, build
from torch import Tensor, nn

import sparseattn
from sparseattn.attn_ops.backends.sage_quantized import quantize_and_attend
from sparseattn.attn_ops.errors import ArgumentError, MissingPackageError, UnsupportedError
from sparseattn.fx_passes.export.report_file import KEY
from sparseattn.lowering.onnx.translations import OPS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

BLOCKS = {"block_q": 32, "block_k": 32}
VIDEO: dict[str, Any] = {"grid": (4, 4, 10), "tile": (2, 2, 5)}
HALF = sparseattn.Policy(
    name="half", rules=(sparseattn.Rule(use="block_topk", params={"keep_ratio": 0.5, "block_q": 16, "block_k": 16}),)
)


class EveryOp(nn.Module):
    """Calls each op once, on the same tensors of 160 tokens."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ops = torch.ops.sparseattn
        lists = ops.sparge_block_map(q, k, keep_ratio=0.4, **BLOCKS)
        return (
            *lists,
            *ops.block_sparse_attention(q, k, v, *lists, **BLOCKS),
            *ops.block_topk_attention(q, k, v, **BLOCKS),
            *ops.flash_attention(q, k, v, causal=True),
            *ops.sage_attention(q, k, v, pv="fp8", provider="reference"),
            *quantize_and_attend(q, k, v, pv="fp8", provider="reference"),
            *ops.sage_fp4_attention(q, k, v),
            *ops.sage_sparse_linear_attention(q, k, v, pv="fp8", **BLOCKS, provider="reference"),
            *ops.sliding_tile_attention(q, k, v, window=(1, 3, 1), **VIDEO),
            *ops.sparge_attention(q, k, v, pv="fp8", **BLOCKS, provider="reference"),
            *ops.sparse_linear_attention(q, k, v, **BLOCKS),
            *ops.video_sparse_attention(q, k, v, sparsity=0.5, **VIDEO),
            *ops.vmoba_attention(q, k, v, grid=VIDEO["grid"], chunk=(2, 2, 5)),
        )


class Layer(nn.Module):
    """Attention twice in the same way, once in another; the lse of the last alone is used."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ops = torch.ops.sparseattn
        x, _ = ops.block_topk_attention(q, k, v, **BLOCKS)
        x, _ = ops.block_topk_attention(x, k, v, **BLOCKS)
        x, lse = ops.block_topk_attention(x, k, v, keep_ratio=5 / 7, **BLOCKS)
        return x * lse.unsqueeze(-1)


def _qkv(batch: int = 1, seq: int = 160) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, heads, seq, 16) for heads in (4, 2, 2))


def _exported(module: nn.Module, inputs: tuple[Tensor, ...], **more: Any) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs, **more)


def _run(path: Path, inputs: Any) -> list[np.ndarray]:
    loaded = session(path)
    if not isinstance(inputs, dict):
        inputs = dict(zip((given.name for given in loaded.get_inputs()), inputs, strict=True))
    return loaded.run(None, {given.name: inputs[given.name].numpy() for given in loaded.get_inputs()})


def _ours(model: Any) -> list[Any]:
    return [node for node in model.graph.node if node.domain == "sparseattn"]


@pytest.mark.parametrize("mode", ["functions", "custom"])
def test_every_op_is_one_node(mode: str, tmp_path: Path) -> None:
    inputs = _qkv()
    path = sparseattn.export.onnx(_exported(EveryOp(), inputs), tmp_path / "ops.onnx", mode=mode)
    model = onnx.load(path)
    assert sorted(node.op_type for node in _ours(model)) == sorted(OPS)
    assert all(len(node.output) == 2 for node in _ours(model))
    if mode == "custom":
        assert not model.functions
        return
    assert sorted(function.name for function in model.functions) == sorted(OPS)
    names = [output.name for output in model.graph.output]
    for name, got, want in zip(names, _run(path, inputs), EveryOp()(*inputs), strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4, err_msg=name)


def test_calls_alike_share_a_function_and_an_unused_lse_is_left_out(tmp_path: Path) -> None:
    inputs = _qkv()
    path = sparseattn.export.onnx(_exported(Layer(), inputs), tmp_path / "layer.onnx")
    model = onnx.load(path)
    assert [function.overload for function in model.functions] == ["", "2"]
    assert [(node.overload, len(node.output)) for node in _ours(model)] == [("", 1), ("", 1), ("2", 2)]
    np.testing.assert_allclose(_run(path, inputs)[0], Layer()(*inputs).numpy(), rtol=0, atol=1e-4)


def test_batch_and_length_stay_dynamic(tmp_path: Path) -> None:
    batch, seq = torch.export.Dim("batch", max=64), torch.export.Dim("seq", min=2, max=1 << 16)
    dynamic = tuple({0: batch, 2: seq} for _ in range(3))
    program = _exported(Layer(), _qkv(2), dynamic_shapes=dynamic)
    path = sparseattn.export.onnx(program, tmp_path / "dynamic.onnx")
    for sizes in ((1, 96), (2, 200), (3, 333)):
        inputs = _qkv(*sizes)
        np.testing.assert_allclose(_run(path, inputs)[0], Layer()(*inputs).numpy(), rtol=0, atol=1e-4)


@pytest.mark.models
@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "llama"])
def test_real_models(name: str, tmp_path: Path) -> None:
    entry = next(entry for entry in ZOO if entry.name == name)
    model, inputs = build(entry)
    with torch.no_grad():
        program, report = sparseattn.rewrite(torch.export.export(model, (), inputs), HALF)
        assert report.rewritten > 0
        path = sparseattn.export.onnx(program, tmp_path / f"{name}.onnx", report)
        wanted = program.module()(**inputs)
    saved = onnx.load(path)
    assert [node.op_type for node in _ours(saved)] == ["block_topk_attention"] * report.rewritten
    assert len(saved.functions) == 1
    wanted = list(wanted.values()) if hasattr(wanted, "values") else list(wanted)
    for got, want in zip(_run(path, inputs), wanted, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4)


@pytest.mark.models
def test_a_real_model_with_dynamic_batch_and_length(tmp_path: Path) -> None:
    model, inputs = build(next(entry for entry in ZOO if entry.name == "llama"))
    sizes = {0: torch.export.Dim("batch", max=16), 1: torch.export.Dim("seq", min=2, max=60)}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes={"input_ids": sizes, "use_cache": None})
        program, report = sparseattn.rewrite(program, HALF)
        path = sparseattn.export.onnx(program, tmp_path / "llama.onnx", report)
        for batch, seq in ((1, 20), (2, 33), (3, 57)):
            tokens = torch.randint(1, 90, (batch, seq))
            wanted = next(iter(program.module()(input_ids=tokens, use_cache=False).values()))
            np.testing.assert_allclose(_run(path, (tokens,))[0], wanted.numpy(), rtol=0, atol=1e-4)
    assert len(_ours(onnx.load(path))) == report.rewritten == 2


class Dense(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_the_report_travels_and_dense_attention_is_the_operator(tmp_path: Path) -> None:
    inputs = (torch.randn(1, 2, 64, 16),)
    program, report = sparseattn.rewrite(_exported(Dense(), inputs), HALF)
    path = sparseattn.export.onnx(program, tmp_path / "model.onnx", report, input_names=["q"], output_names=["y"])
    model = onnx.load(path)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(kept[KEY]) == json.loads(report.to_json()) == sparseattn.export.read_report(path)
    assert [(x.name) for x in (*model.graph.input, *model.graph.output)] == ["q", "y"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.report.json"]
    dense = sparseattn.export.onnx(_exported(Dense(), inputs), tmp_path / "dense.onnx")
    assert "Attention" in [node.op_type for node in onnx.load(dense).graph.node]


def test_weights_of_a_large_model_get_their_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sparseattn.export.onnx.__globals__, "_LARGEST_FILE", 64)
    layer, x = nn.Linear(32, 32), torch.randn(1, 32)
    path = sparseattn.export.onnx(_exported(layer, (x,)), tmp_path / "large.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    np.testing.assert_allclose(_run(path, (x,))[0], layer(x).detach().numpy(), rtol=0, atol=1e-5)


class Halves(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return torch.ops.sparseattn.sparse_linear_attention(q, q, q, compat=True)[0]


class Fp8(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return torch.ops.sparseattn.sage_attention(q, q, q, pv="fp8")[0]


def test_what_cannot_be_said_is_refused_before_a_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("as it was")
    halves = _exported(Halves(), (torch.randn(1, 2, 64, 16).half(),))
    with pytest.raises(UnsupportedError, match=r"compat must be False for torch.float16.*export in float32"):
        sparseattn.export.onnx(halves, path)
    fp8 = _exported(Fp8(), (torch.randn(1, 2, 64, 16),))
    with pytest.raises(UnsupportedError, match=r"needs opset 19 or newer, got 18"):
        sparseattn.export.onnx(fp8, path, opset=18)
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


class Backward(nn.Module):
    def forward(self, q: Tensor, index: Tensor, count: Tensor) -> Tensor:
        lists = {"block_index": index, "block_count": count, **BLOCKS}
        out, lse = torch.ops.sparseattn.block_sparse_attention(q, q, q, **lists)
        given = q, None, out, lse, q, q, q, index, count, None, 32, 32, False, None, "auto"
        return torch.ops.sparseattn.block_sparse_attention_backward(*given)[0]


def test_an_op_without_translation_is_named(tmp_path: Path) -> None:
    index = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    program = _exported(Backward(), (torch.randn(1, 2, 64, 16), index, torch.ones(1, 1, 2, dtype=torch.int32)))
    with pytest.raises(UnsupportedError, match=r"sparseattn::block_sparse_attention_backward has no translation"):
        sparseattn.export.onnx(program, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "inline"}, "mode must be"),
        ({"opset": 17}, "opset must be at least 18, got 17"),
        ({"path": "model.pt2"}, "path must end in .onnx"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    program = _exported(Dense(), (torch.randn(1, 2, 64, 16),))
    with pytest.raises(ArgumentError, match=message):
        sparseattn.export.onnx(program, **{"path": tmp_path / "model.onnx", **wrong})


def test_without_the_packages_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("sparseattn.lowering.onnx"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r"onnx is not installed. Run: pip install 'sparseattn\[onnx\]'"):
        sparseattn.export.onnx(_exported(Dense(), (torch.randn(1, 2, 64, 16),)), tmp_path / "model.onnx")


def test_importing_the_package_imports_no_onnx() -> None:
    code = "import sys, sparseattn; sys.exit(any(name.partition('.')[0].startswith('onnx') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
