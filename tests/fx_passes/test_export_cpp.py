"""The ops without Python: the shared library in a process that knows no sparseattn, and the runner of examples/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cpp_library_calls import (
    Call,
    block_sparse_calls,
    calls_refused,
    calls_refused_alike,
    flash_calls,
    topk_calls,
)
from torch import Tensor, nn

import sparseattn
from sparseattn.attn_ops.backends.sage_quantized import quantize_and_attend
from sparseattn.attn_ops.errors import ArgumentError, UnsupportedError
from sparseattn.attn_ops.kernels.cpu.native.build import BuildError, compiler_command
from sparseattn.fx_passes.export.contents import op_calls
from sparseattn.fx_passes.export.cpp_program import IN_LIBRARY, OPENED

RUNNER = Path(__file__).parents[2] / "examples" / "cpp_runner"
DOCS = Path(__file__).parents[2] / "docs" / "export_cpp.md"
REFUSED = ("sage_attention", "sage_attention_quantized", "vmoba_attention")
GRID = [4, 8, 8]
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}

# Runs calls in a process where only the library knows the ops.
_LIBRARY_ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
results = []
for name, args, kwargs in torch.load(sys.argv[2]):
    try:
        results.append(getattr(torch.ops.sparseattn, name)(*args, **kwargs))
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
schemas = {name: str(getattr(torch.ops.sparseattn, name).default._schema) for name in sys.argv[4:]}
assert "sparseattn" not in sys.modules
torch.save((results, schemas), sys.argv[3])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        compiler_command()
    except BuildError as error:
        pytest.skip(str(error))
    return tmp_path_factory.mktemp("cpp")


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    return sparseattn.export.build_library(folder / "libsparseattn_ops.so")


@pytest.fixture(scope="module")
def runner(folder: Path) -> Path:
    subprocess.run([RUNNER / "build.sh", Path(torch.__file__).parent, folder / "runner"], check=True)
    return folder / "runner"


def in_library(library: Path, calls: list[Call]) -> tuple[list[Any], dict[str, str]]:
    """What the library alone makes of the calls, and its schemas."""
    given, results = library.with_name("calls.pt"), library.with_name("results.pt")
    torch.save(calls, given)
    command = [sys.executable, "-W", "ignore", "-c", _LIBRARY_ALONE, library, given, results, *IN_LIBRARY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: tuple[list[Any], dict[str, str]] = torch.load(results)
    return loaded


def test_library_computes_what_python_does(library: Path) -> None:
    torch.manual_seed(0)
    calls = [*topk_calls(), *block_sparse_calls(), *flash_calls()]
    results, schemas = in_library(library, calls)
    for (op, args, kwargs), result in zip(calls, results, strict=True):
        expected = getattr(torch.ops.sparseattn, op)(*args, **kwargs)
        what = f"{op} {[tuple(x.shape) for x in args]} {kwargs}"
        assert not isinstance(result, str), f"{what}: {result}"
        for got, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(
                got, wanted, rtol=0, atol=1e-5, equal_nan=True, msg=lambda m, w=what: f"{w}\n{m}"
            )
        assert result[0].stride() == expected[0].stride(), what
    assert schemas == {op: str(getattr(torch.ops.sparseattn, op).default._schema) for op in IN_LIBRARY}


def test_library_names_no_path_of_this_machine(library: Path) -> None:
    contents = library.read_bytes()
    for folder in (Path(torch.__file__).parent, Path(sparseattn.__file__).parent, library.parent):
        assert str(folder).encode() not in contents


def test_library_refuses_what_python_refuses(library: Path) -> None:
    same, other = calls_refused_alike(), calls_refused()
    results, _ = in_library(library, [*same, *other.values()])
    for (op, args, kwargs), result in zip(same, results, strict=False):
        with pytest.raises(ArgumentError) as refusal:
            getattr(torch.ops.sparseattn, op)(*args, **kwargs)
        assert result == f"ValueError: {refusal.value}"
    for part, result in zip(other, results[len(same) :], strict=True):
        assert part in result


def test_library_leaves_python_its_ops(library: Path) -> None:
    code = (
        "import sys, torch, sparseattn\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "q = torch.randn(1, 1, 64, 16, requires_grad=True)\n"
        "torch.ops.sparseattn.block_topk_attention(q, q, q, provider='reference')[0].sum().backward()\n"
        "print(q.grad is not None)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


class Native(nn.Module):
    """Ops that the library has, at any length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 3 * 4 * 8)
        self.register_buffer("ratios", torch.tensor([0.9, 0.1, 0.4, 0.2]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ops = torch.ops.sparseattn
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        few = k[:, ::2], v[:, ::2]
        topk, lse = ops.block_topk_attention(q, *few, keep_ratio=0.3, block_q=16, block_k=16, causal=True)
        by_head, _ = ops.block_topk_attention(q, k, v, block_q=32, block_k=16, keep_ratios=self.ratios, provider="cpu")
        blocks = -(-x.shape[1] // 16)
        index = torch.arange(0, blocks, 2, dtype=torch.int32).expand(1, 1, blocks, -1)
        count = torch.full((1, 1, blocks), (blocks + 1) // 2, dtype=torch.int32)
        listed, _ = ops.block_sparse_attention(q, k, v, index, count, block_q=16, block_k=16)
        window, _ = ops.flash_attention(topk, *few, causal=True, window=20, provider="torch")
        return topk, lse, by_head, listed, window


VIDEO = {"grid": GRID, "tile": [2, 4, 4]}
BY_OPENING: dict[str, dict[str, Any]] = {
    "sage_fp4_attention": {},
    "sage_sparse_linear_attention": {"keep_ratio": 0.3, "block_q": 64, "block_k": 32},
    "sliding_tile_attention": {**VIDEO, "window": [3, 1, 3], "provider": "cpu"},
    "sparge_attention": {"mass": 0.8, "similarity": 0.1, "block_q": 64, "causal": True},
    "sparse_linear_attention": {"keep_ratio": 0.3, "block_q": 32, "block_k": 32},
    "video_sparse_attention": {**VIDEO, "sparsity": 0.6},
}
LEARNED = {"sparse_linear_attention", "sage_sparse_linear_attention"}


class Opened(nn.Module):
    """Ops that for_cpp opens, with weights where they take some, and one op that it leaves."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.weight = names, nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        outputs = list(torch.ops.sparseattn.block_topk_attention(q, k, v, block_q=32, block_k=32))
        for name in self.names:
            learned = [self.weight] * (name in LEARNED) + [torch.sigmoid(q)] * (name == "video_sparse_attention")
            outputs += getattr(torch.ops.sparseattn, name)(q, k, v, *learned, **BY_OPENING[name])
        return outputs


def run(runner: Path, library: Path, package: Path, args: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], str]:
    """Outputs of the runner, and the files that its process has loaded."""
    given, results = package.with_suffix(".in.pt"), package.with_suffix(".out.pt")
    torch.save(args, given)
    done = subprocess.run(
        [runner, library, package, given, results],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_DEBUG": "files"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs: tuple[Tensor, ...] = torch.load(results)
    assert done.stdout.count("output [") == len(outputs)
    return outputs, done.stderr


@torch.no_grad()
def test_runner_at_three_lengths_without_python(runner: Path, library: Path, folder: Path) -> None:
    torch.manual_seed(0)
    model, shapes = Native().eval(), ({1: torch.export.Dim("tokens", min=64, max=1024)},)
    program = torch.export.export(model, (torch.randn(1, 200, 16),), dynamic_shapes=shapes)
    assert sparseattn.export.for_cpp(program) is program
    package = sparseattn.export.aoti(program, folder / "native.pt2", inductor_configs=QUICK)
    for tokens in (200, 77, 320):
        x = torch.randn(1, tokens, 16)
        outputs, loaded = run(runner, library, package, (x,))
        for got, wanted in zip(outputs, model(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        assert "libsparseattn_ops.so" in loaded
        assert "libpython" not in loaded
        assert "libtorch_python" not in loaded


@torch.no_grad()
def test_for_cpp_opens_and_computes_the_same() -> None:
    torch.manual_seed(0)
    model, args = Opened(*OPENED), tuple(torch.randn(1, 2, 256, 8) for _ in range(3))
    program = torch.export.export(model, args)
    opened = sparseattn.export.for_cpp(program)
    assert [call.op for call in op_calls(program)] == ["block_topk_attention", *OPENED]  # it is left as it was
    assert [call.op for call in op_calls(opened)] == ["block_topk_attention", *["block_sparse_attention"] * 5]
    for got, wanted in zip(opened.module()(*args), model(*args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)  # opened, INT8 products are those of fp32 numbers


@torch.no_grad()
def test_runner_with_ops_that_were_opened(runner: Path, library: Path, folder: Path) -> None:
    torch.manual_seed(0)
    model, args = Opened("sparge_attention", "sparse_linear_attention"), [torch.randn(1, 2, 256, 8) for _ in range(3)]
    args[2] = args[2].half().float()  # sparge rounds v to fp16, and AOTInductor drops a cast there and back
    program = sparseattn.export.for_cpp(torch.export.export(model, tuple(args)))
    package = sparseattn.export.aoti(program, folder / "opened.pt2", inductor_configs=QUICK)
    outputs, _ = run(runner, library, package, tuple(args))
    for got, wanted in zip(outputs, model(*args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def exported(op: str, tokens: Any = None, **given: Any) -> torch.export.ExportedProgram:
    # One op takes no tensors as they are: what quantizes for it is exported too.
    call = quantize_and_attend if op == "sage_attention_quantized" else getattr(torch.ops.sparseattn, op)

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = call(q, k, v, **given)[0]
            return out

    shapes = None if tokens is None else ({2: tokens},) * 3
    with torch.no_grad():
        return torch.export.export(Model(), tuple(torch.randn(1, 2, 256, 16) for _ in range(3)), dynamic_shapes=shapes)


def test_every_op_is_in_the_library_or_opened_or_refused() -> None:
    ops = {spec.op for spec in sparseattn.backends().values()}
    assert ops >= {*IN_LIBRARY, *OPENED, *REFUSED}
    builtin = {op for op in ops if hasattr(sparseattn.ops, op)}
    assert builtin == {*IN_LIBRARY, *OPENED, *REFUSED}
    page = DOCS.read_text(encoding="utf-8")
    assert all(f"| `{op}` |" in page for op in builtin)


@pytest.mark.parametrize("op", REFUSED)
def test_for_cpp_refuses_what_has_no_cpp(op: str) -> None:
    program = exported(op, **({"grid": GRID} if op == "vmoba_attention" else {}))
    with pytest.raises(UnsupportedError, match=rf"Python:\n  {op} has no C\+\+ implementation\. The library has"):
        sparseattn.export.for_cpp(program)


def test_for_cpp_refuses_other_providers_and_lengths() -> None:
    with pytest.raises(UnsupportedError, match=r'block_topk_attention is by "reference", the library has "cpu"'):
        sparseattn.export.for_cpp(exported("block_topk_attention", provider="reference"))
    dynamic = exported("sparse_linear_attention", torch.export.Dim("tokens", min=32, max=1024))
    with pytest.raises(UnsupportedError, match=r"sparse_linear_attention must be opened, but .* fixed sizes"):
        sparseattn.export.for_cpp(dynamic)
    with pytest.raises(UnsupportedError, match=r"sparge_attention.default has pv=fp8, for which .* must be fp16"):
        sparseattn.export.for_cpp(exported("sparge_attention", pv="fp8"))
    with pytest.raises(UnsupportedError, match=r"sparge_attention.default has pv_threshold=20.0, .* must be None"):
        sparseattn.export.for_cpp(exported("sparge_attention", pv_threshold=20.0))
    fixed = exported("sparse_linear_attention")
    fixed.example_inputs = None
    with pytest.raises(UnsupportedError, match="no example inputs"):
        sparseattn.export.for_cpp(fixed)
    with pytest.raises(ArgumentError, match="program must be an ExportedProgram, got Linear"):
        sparseattn.export.for_cpp(nn.Linear(1, 1))


def package_of(path: Path, op: str, provider: str = "auto", device: str = "cpu") -> Path:
    """The parts of a package that say what it calls and where."""
    with zipfile.ZipFile(path, "w") as files:
        inputs = [{"name": "q", "arg": {}}, {"name": "provider", "arg": {"as_string": provider}}]
        targets = {f"sparseattn::{op}": inputs, "aten::sort": []}
        nodes = [{"node": {"target": target, "inputs": inputs}} for target, inputs in targets.items()]
        files.writestr("m/data/aotinductor/model/c.wrapper.json", json.dumps({"nodes": nodes}))
        files.writestr("m/data/aotinductor/model/c.wrapper_metadata.json", json.dumps({"AOTI_DEVICE_KEY": device}))
    return path


def test_build_library_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, path = sparseattn.export.build_library, tmp_path / "ops.so"
    with pytest.raises(UnsupportedError, match=r"model\.pt2 cannot run without Python:\n  sage_attention has no C\+\+"):
        build(path, package=package_of(tmp_path / "model.pt2", "sage_attention"))
    with pytest.raises(UnsupportedError, match=r"model\.pt2 is for cuda, the library has CPU kernels"):
        build(path, package=package_of(tmp_path / "model.pt2", "flash_attention", device="cuda"))
    with pytest.raises(UnsupportedError, match='flash_attention is by "flash_attn", the library has "torch"'):
        build(path, package=package_of(tmp_path / "model.pt2", "flash_attention", "flash_attn"))
    with pytest.raises(ArgumentError, match=r"package must be an AOTInductor package, got .*nothing.pt2"):
        build(path, package=tmp_path / "nothing.pt2")
    with pytest.raises(ArgumentError, match="instruction_set must be one of avx512_bf16, avx512_vnni, avx512, avx2"):
        build(path, instruction_set="neon")
    with pytest.raises(ArgumentError, match=r"path must end in \.so"):
        build(tmp_path / "ops.dll")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(UnsupportedError, match=r"there is no library, because the compiler .* does not run"):
        build(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
