"""onnx: turn a program into an ONNX model in which our ops are nodes of the domain `sparseattn`.

By default each such node has a local function of standard operators, so that any runtime runs the model, and one with a
kernel for the node uses that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from ...attn_ops.checks import check_choice
from ...attn_ops.errors import ArgumentError, MissingPackageError, UnsupportedError
from ..report import Report
from .contents import op_calls
from .exported_program import check_program
from .report_file import KEY, write_report
from .whole_files import checked_target, whole_files

if TYPE_CHECKING:
    from onnx import ModelProto

_VERB = "export.onnx"
MODES = ("functions", "custom")
LEAST_OPSET, OPSET = 18, 23
_LARGEST_FILE = 1 << 30
"""Bytes of weights from which they get a file of their own; the format ends at twice that."""


def onnx(
    program: ExportedProgram,
    path: str | Path,
    report: Report | None = None,
    *,
    mode: str = "functions",
    opset: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    optimize: bool = False,
) -> Path:
    """Write a program as an ONNX model, with its report in the model's metadata and beside it.

        program, report = sparseattn.rewrite(torch.export.export(model, inputs, dynamic_shapes=...), policy)
        sparseattn.export.onnx(program, "model.onnx", report)       # and model.report.json

    Args:
        program: the program; what it leaves dynamic stays so.
        path: where to, a .onnx file. It is replaced at once, complete and checked, or left as it was. Weights of more
            than a gibibyte go to a file beside it, model.onnx.data.
        report: what `rewrite` returned with the program.
        mode: "functions" gives every node of ours a body of standard operators; "custom" leaves it bare, for a runtime
            that has kernels.
        opset: version of the standard operators, at least 18. From 23 on, exact attention is the operator Attention.
        input_names: names of the model's inputs; None takes the program's.
        output_names: names of its outputs, likewise.
        optimize: let torch's exporter fold constants and fuse operators. Runtimes do that themselves, and in torch 2.13
            it makes a RotaryEmbedding that onnxruntime refuses for more than one batch element.

    Returns:
        The path, absolute.

    Raises:
        ArgumentError: on a path that is no .onnx file in a folder that exists, or another mode or opset.
        MissingPackageError: without the packages onnx and onnxscript.
        UnsupportedError: if ONNX cannot say what an op of the program asks.

    After an error nothing is left behind.
    """
    target = checked_target(_VERB, path, ".onnx")
    check_program(_VERB, program)
    check_choice(_VERB, "mode", mode, MODES)
    if opset < LEAST_OPSET:
        raise ArgumentError(_VERB, "opset", f"be at least {LEAST_OPSET}", opset)
    model = _model(program, mode, opset, input_names, output_names, optimize)
    if report is not None:
        model.metadata_props.add(key=KEY, value=report.to_json(indent=None))
    with whole_files(target) as folder:
        _write(model, folder / target.name)
        write_report(folder, target, report)
    return target


def _model(
    program: ExportedProgram,
    mode: str,
    opset: int,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    optimize: bool,
) -> ModelProto:
    try:
        from ...lowering.onnx.functions import add_functions, drop_unused_lse
    except ModuleNotFoundError as missing:
        raise _missing(missing) from None
    from ...lowering.onnx.symbolic import decompositions
    from ...lowering.onnx.translations import OPS

    for call in op_calls(program):
        if call.op not in OPS:
            raise UnsupportedError(
                f"{_VERB}: sparseattn::{call.op} has no translation. Export a forward pass without gradients, "
                f"of these: {', '.join(OPS)}."
            )
    bare = program.run_decompositions(decompositions())
    try:
        exported = torch.onnx.export(
            bare,
            dynamo=True,
            opset_version=opset,
            input_names=input_names,
            output_names=output_names,
            verbose=False,
            optimize=optimize,
        )
    except ModuleNotFoundError as missing:
        raise _missing(missing) from None
    assert exported is not None
    model = exported.model_proto
    drop_unused_lse(model)
    if mode == "functions":
        add_functions(model)
    return model


def _missing(error: ModuleNotFoundError) -> MissingPackageError:
    return MissingPackageError(f"{_VERB}: {error.name} is not installed. Run: pip install 'sparseattn[onnx]'.")


def _write(model: ModelProto, path: Path) -> None:
    """Save the model and check it, shapes included."""
    import onnx

    weights = sum(len(weight.raw_data) for weight in model.graph.initializer)
    onnx.save(model, path, save_as_external_data=weights > _LARGEST_FILE, location=f"{path.name}.data")
    onnx.checker.check_model(str(path), full_check=True)
