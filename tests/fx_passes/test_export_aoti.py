"""export.aoti: every op in a compiled package, run by a process that has neither the model nor its program."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, tokens
from support.every_op import OPS, every_op, inputs
from support.processes import attempt, run
from torch._subclasses.fake_tensor import FakeTensorMode

import sparseattn
from sparseattn import Policy, Rule, export
from sparseattn.attn_ops.errors import ArgumentError, UnsupportedError

QUICK = {"cpp_cache_precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
"""The calls of the ops are compiled in seconds; the kernels of Inductor are optimized as ever."""
LENGTHS = (32, 64, 100)
SAGE = Policy([Rule("sage", mode="require")])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, program = every_op()
    _, report = sparseattn.rewrite(program)
    path = tmp_path_factory.mktemp("aoti") / "ops.pt2"
    return model, export.aoti(program, path, report, inductor_configs=QUICK)


def test_every_op_equals_the_eager_op_in_a_fresh_process(package: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = package
    given = {length: inputs(length) for length in LENGTHS}
    torch.save(given, tmp_path / "inputs.pt")
    run(
        "import sys, torch, sparseattn\n"
        "run, given = torch._inductor.aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])\n"
        "torch.save({length: run(*args) for length, args in given.items()}, sys.argv[3])",
        path,
        *(tmp_path / name for name in ("inputs.pt", "outputs.pt")),
    )
    for length, outputs in torch.load(tmp_path / "outputs.pt").items():
        torch.testing.assert_close(outputs, model(*given[length]), rtol=1e-5, atol=1e-5)


def test_every_op_is_a_call_in_the_package(package: tuple[Any, Path]) -> None:
    calls = _member(package[1], ".wrapper.json")
    called = [node["node"]["target"] for node in json.loads(calls)["nodes"]]
    assert [name for name in called if "sparseattn" in name] == [f"sparseattn::{op}" for op in OPS]


def test_the_report_is_in_the_package_and_beside_it(package: tuple[Any, Path]) -> None:
    metadata = torch._inductor.aoti_load_package(str(package[1])).loader.get_metadata()
    assert json.loads(metadata["sparseattn_report"]) == export.read_report(package[1])


def test_a_process_without_the_ops_is_told_which_is_missing(package: tuple[Any, Path]) -> None:
    done = attempt("import sys, torch\ntorch._inductor.aoti_load_package(sys.argv[1])", package[1])
    assert done.returncode != 0
    assert "Could not find schema for sparseattn::" in done.stderr


def test_a_provider_of_another_machine_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    program, report = sparseattn.rewrite(_exported(torch.bfloat16), SAGE, capability="sm90")
    with pytest.raises(UnsupportedError, match="sage_attention by triton: needs a cuda device, this is cpu") as caught:
        export.aoti(program, tmp_path / "model.pt2", report)
    assert "move_to_device_pass" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_program_on_a_gpu_that_is_not_here_is_refused(tmp_path: Path) -> None:
    program, report = sparseattn.rewrite(_exported(torch.bfloat16), SAGE, capability="sm90")
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            node.meta["val"] = _on_gpu(value)
    with pytest.raises(UnsupportedError, match="it is on cuda:0, and this machine has none"):
        export.aoti(program, tmp_path / "model.pt2", report)
    assert not list(tmp_path.iterdir())


def _on_gpu(value: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(value.shape, dtype=value.dtype, device="cuda:0")


def test_a_program_without_example_inputs_is_refused(tmp_path: Path) -> None:
    program = _exported()
    program.example_inputs = None
    with pytest.raises(ArgumentError, match="program must have example_inputs, got none"):
        export.aoti(program, tmp_path / "model.pt2")


def test_nothing_is_left_of_a_package_that_could_not_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_program: object, *, package_path: str, **_how: object) -> None:
        Path(package_path).write_bytes(b"half")
        raise RuntimeError("g++ failed")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", half)
    with pytest.raises(RuntimeError, match=r"g\+\+ failed"):
        export.aoti(_exported(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def _exported(dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    return torch.export.export(Blocks().eval().to(dtype), (tokens().to(dtype),))


def _member(path: Path, suffix: str) -> str:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(suffix))
        return archive.read(name).decode()
