"""How our ops leave torch: each becomes one bare node `sparseattn::<op>` of the exported graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...attn_ops.blocks.sparge_arguments import BLOCK_MAP
from .translations import OPS, Call, call_of

DOMAIN, VERSION = "sparseattn", 1
EXACT = "sparseattn.parameters"
"""Where a node keeps its parameters as JSON: an attribute of ONNX holds a float in 32 bits only."""


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The table for `ExportedProgram.run_decompositions` that leaves everything but our ops as it is."""
    return {getattr(torch.ops.sparseattn, op).default: _symbolic(op) for op in OPS}


def _symbolic(op: str) -> Callable[..., Any]:
    def decompose(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        call = call_of(op, args, kwargs)
        dtypes, shapes = _results(op, call)
        outputs = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{op}",
            _without_trailing_none(list(call.inputs.values())),
            call.attributes,
            dtypes=dtypes,
            shapes=shapes,
            version=VERSION,
            metadata_props={EXACT: json.dumps(call.attributes)},
        )
        return tuple(outputs)

    return decompose


def _results(op: str, call: Call) -> tuple[list[torch.dtype], list[list[int | torch.SymInt]]]:
    """Data types and shapes of the outputs."""
    q = call.inputs["q"]
    batch, heads, seq, dim = q.shape
    if op != BLOCK_MAP:
        return [call.inputs["v"].dtype, torch.float32], [[batch, heads, seq, dim], [batch, heads, seq]]
    nq, nk = (-(-x.shape[2] // call.attributes[block]) for x, block in ((q, "block_q"), (call.inputs["k"], "block_k")))
    return [torch.int32, torch.int32], [[batch, heads, nq, nk], [batch, heads, nq]]


def _without_trailing_none(inputs: list[Any]) -> list[Any]:
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs
