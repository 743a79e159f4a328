"""export.save and export.load: every op in a file, its report with it, read by a process that never saw the model."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, tokens
from support.every_op import OPS, every_op, inputs
from support.processes import attempt, run

import sparseattn
from sparseattn import Policy, Rule, export
from sparseattn.attn_ops.errors import ArgumentError
from sparseattn.fx_passes.export.contents import op_calls

TOPK = Policy([Rule("block_topk", params={"keep_ratio": 0.5, "block_q": 16, "block_k": 16})])
LENGTHS = (32, 64, 100)


def rewritten(policy: Policy = TOPK, **how: Any) -> tuple[torch.export.ExportedProgram, sparseattn.Report]:
    return sparseattn.rewrite(torch.export.export(Blocks().eval(), (tokens(),)), policy, **how)


def test_every_op_runs_in_a_fresh_process(tmp_path: Path) -> None:
    model, program = every_op()
    export.save(program, tmp_path / "ops.pt2")
    given = {length: inputs(length) for length in LENGTHS}
    torch.save(given, tmp_path / "inputs.pt")
    run(
        "import sys, torch, sparseattn\n"
        "program, report = sparseattn.export.load(sys.argv[1])\n"
        "run, given = program.module(), torch.load(sys.argv[2])\n"
        "torch.save({length: run(*args) for length, args in given.items()}, sys.argv[3])\n"
        "print(report)",
        *(tmp_path / name for name in ("ops.pt2", "inputs.pt", "outputs.pt")),
    )
    for length, outputs in torch.load(tmp_path / "outputs.pt").items():
        torch.testing.assert_close(outputs, model(*given[length]), rtol=1e-5, atol=1e-5)


def test_every_op_is_visible_in_the_file(tmp_path: Path) -> None:
    export.save(every_op()[1], tmp_path / "ops.pt2")
    program, report = export.load(tmp_path / "ops.pt2")
    assert Counter(call.op for call in op_calls(program)) == Counter(OPS)
    assert report is None


@pytest.mark.parametrize("strict", [False, True])
def test_strict_export_and_decompositions_keep_every_op(strict: bool) -> None:
    model, program = every_op(strict=strict)
    decomposed = program.run_decompositions()
    assert [call.op for call in op_calls(decomposed)] == list(OPS)
    torch.testing.assert_close(decomposed.module()(*inputs(48)), model(*inputs(48)))


def test_the_report_is_in_the_file_and_beside_it(tmp_path: Path) -> None:
    program, report = rewritten()
    path = export.save(program, tmp_path / "model.pt2", report)
    loaded, inside = export.load(path)
    assert inside == export.read_report(path) == json.loads(report.to_json())
    assert [site["decision"]["provider"] for site in inside["sites"]] == [call.provider for call in op_calls(loaded)]


def test_what_holds_no_exported_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "package.pt2", "w") as package:
        package.writestr("package/data/aotinductor/model/model.so", "")
    with pytest.raises(ArgumentError, match=r"missing.pt2', which is no file"):
        export.load(tmp_path / "missing.pt2")
    with pytest.raises(ArgumentError, match=r"must be a file that save or torch.export.save wrote, got .*text.pt2'"):
        export.load(tmp_path / "text.pt2")
    with pytest.raises(ArgumentError, match=r"torch._inductor.aoti_load_package loads it"):
        export.load(tmp_path / "package.pt2")


def test_a_process_without_us_is_told_what_to_import(tmp_path: Path) -> None:
    path = export.save(*_swapped(rewritten(), tmp_path / "model.pt2"))
    done = attempt("import sys, torch\ntorch.export.load(sys.argv[1])", path)
    assert done.returncode != 0
    assert "torch.ops.sparseattn.block_topk_attention" in done.stderr


def _swapped(made: tuple[Any, Any], path: Path) -> tuple[Any, Path, Any]:
    return made[0], path, made[1]


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, report = rewritten()
    path = export.save(program, tmp_path / "model.pt2", report)
    before = path.read_bytes()

    def half(_program: object, file: Path, **_how: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", half)
    with pytest.raises(OSError, match="disk full"):
        export.save(program, path, report)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt2", "model.report.json"]


@pytest.mark.parametrize(
    ("path", "word"), [("model.onnx", "must end in .pt2"), ("nowhere/model.pt2", "be in a folder that exists")]
)
def test_a_wrong_path_is_refused(tmp_path: Path, path: str, word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        export.save(rewritten()[0], tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="program must be an ExportedProgram, got Blocks"):
        export.save(Blocks(), tmp_path / "model.pt2")  # type: ignore[arg-type]


def test_a_missing_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"model\.report\.json"):
        export.read_report(tmp_path / "model.pt2")
