"""for_cpp: a program whose ops are all in the C++ library, so that its AOTInductor package runs without Python.

    before:  (q, k, v) -> sliding_tile_attention(grid, tile, window, ...)
    after:   (q, k, v) -> tiling and lists as PyTorch's own operators -> block_sparse_attention -> tiling undone

The op's own Python is traced, so both compute the same; AOTInductor compiles what is around the attention.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

from ...attn_ops.errors import UnsupportedError
from ...attn_ops.kernels.cpu.op_library.build import OPS
from ...attn_ops.op import FORWARDS
from ...attn_ops.resolve import AUTO
from ..normalize.graph import value_of
from ..rewrite import graphs_of
from .contents import OpCall, op_calls
from .exported_program import check_program

IN_LIBRARY = {**dict.fromkeys(OPS, "cpu"), "flash_attention": "torch"}
"""The ops of the C++ library, and the provider that it has for each."""
OPENED = (
    "sage_fp4_attention",
    "sage_sparse_linear_attention",
    "sliding_tile_attention",
    "sparge_attention",
    "sparse_linear_attention",
    "video_sparse_attention",
)
"""Ops that are PyTorch's own operators around one of those, or PyTorch's alone."""
_AT_ONCE = {"pv": "fp16", "pv_threshold": None, "pv_thresholds": None}
"""What SpargeAttention's arguments must be: with others its Python goes from row to row, by what it finds in each."""


def for_cpp(program: ExportedProgram) -> ExportedProgram:
    """A program that computes the same with ops of the C++ library only.

        program, report = sparseattn.rewrite(torch.export.export(model, inputs), policy)
        sparseattn.export.aoti(sparseattn.export.for_cpp(program), "model.pt2", report)

    Args:
        program: a program for the CPU. It is left as it is; if nothing is to be opened it is the result.

    Raises:
        ArgumentError: if it is no ExportedProgram.
        UnsupportedError: if it calls an op or a provider that has no C++ implementation, or has to be opened and has
            dynamic sizes or no example inputs.
    """
    check_program("export.for_cpp", program)
    calls = op_calls(program)
    reasons = [*map(_why_not, calls), *_row_by_row(program)]
    if reasons := list(dict.fromkeys(filter(None, reasons))):
        raise UnsupportedError("\n  ".join(["export.for_cpp: the program cannot run without Python:", *reasons]))
    opened = sorted({call.op for call in calls} - set(IN_LIBRARY))
    if not opened:
        return program
    if reason := _why_not_traced(program):
        raise UnsupportedError(f"export.for_cpp: {', '.join(opened)} must be opened, but {reason}")
    return _traced(program, opened)


def why_not_in_library(op: str, provider: str) -> str | None:
    """Why the C++ library cannot run an op by a provider, or None."""
    if op not in IN_LIBRARY:
        return (
            f"{op} has no C++ implementation. The library has {', '.join(IN_LIBRARY)}, and export.for_cpp brings "
            f"{', '.join(OPENED)} down to them. Run it in Python, after `import sparseattn`, or choose another."
        )
    if provider not in (AUTO, here := IN_LIBRARY[op]):
        return f'{op} is by "{provider}", the library has "{here}". Rewrite the program with a capability of the CPU.'
    return None


def _why_not(call: OpCall) -> str | None:
    if call.device.type != "cpu":
        return f"{call.op} is on {call.device}, the library has CPU kernels."
    return None if call.op in OPENED else why_not_in_library(call.op, call.provider)


def _row_by_row(program: ExportedProgram) -> list[str]:
    """Sentences about arguments of ops that cannot be opened with them."""
    targets = [getattr(torch.ops.sparseattn, op).default for op in ("sparge_attention", "sage_sparse_linear_attention")]
    nodes = [node for graph in graphs_of(program.graph_module) for node in graph.graph.nodes if node.target in targets]
    return [
        f"{node.target} has {name}={value}, for which there is no C++ implementation: it must be {_AT_ONCE[name]}."
        for node in nodes
        for name, value in node.kwargs.items()
        if value != _AT_ONCE.get(name, value)
    ]


def _why_not_traced(program: ExportedProgram) -> str | None:
    sizes = [
        size
        for node in program.graph.nodes
        if node.name in program.graph_signature.user_inputs and isinstance(value_of(node), torch.Tensor)
        for size in value_of(node).shape
    ]
    if not all(isinstance(size, int) for size in sizes):
        return "how many blocks it keeps is fixed by the trace: export with fixed sizes, one program for each length."
    if program.example_inputs is None:
        return "the program has no example inputs to trace with. Export again, or set program.example_inputs."
    return None


def _traced(program: ExportedProgram, opened: list[str]) -> ExportedProgram:
    """The program exported again, with the Python of those ops in place of the ops."""
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    python = {getattr(torch.ops.sparseattn, op).default: FORWARDS[op] for op in opened}
    for graph in graphs_of(module):
        for node in graph.graph.nodes:
            node.target = python.get(node.target, node.target)
        graph.recompile()
    args, kwargs = program.example_inputs
    with torch.no_grad():
        return torch.export.export(module, args, kwargs, strict=False)
