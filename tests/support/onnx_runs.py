"""Run ONNX models, and single calls of our ops as ONNX, without exporting a whole program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseattn.lowering.onnx.symbolic import DOMAIN, VERSION
from sparseattn.lowering.onnx.translations import Call, call_of, function_body

onnx: Any = pytest.importorskip("onnx", reason="needs the packages of the extra onnx")
onnxruntime: Any = pytest.importorskip("onnxruntime", reason="needs the packages of the extra onnx")

_TYPES = {torch.float32: 1, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.float16: 10}


class _Record(TorchDispatchMode):
    """Remembers the first call of an op of ours."""

    call: Call | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == DOMAIN and self.call is None:
            self.call = call_of(func._schema.name.partition("::")[2], args, kwargs or {})
        return func(*args, **(kwargs or {}))


def recorded(function: Callable[..., Any]) -> tuple[Call, list[Tensor]]:
    """The call of our op that a function makes, and what it returns."""
    record = _Record()
    with torch.no_grad(), record:
        result = function()
    assert record.call is not None
    return record.call, list(result) if isinstance(result, tuple) else [result]


def model_of(call: Call, outputs: list[Tensor], opset: int = 23) -> Any:
    """A checked model of one node and its function; batch and lengths are dynamic."""
    from sparseattn.lowering.onnx.proto import function_of

    helper = onnx.helper
    names = [name if tensor is not None else "" for name, tensor in call.inputs.items()]
    body, made = function_body(call.op, names, call.attributes, lse=len(outputs) == 2, opset=opset)
    function = function_of(body, call.op, "", call.inputs, made, [])
    results = ["out", "lse"][: len(outputs)]
    node = helper.make_node(call.op, names, results, domain=DOMAIN)
    given = [(name, tensor) for name, tensor in call.inputs.items() if tensor is not None]
    graph = helper.make_graph([node], "graph", _infos(given), _infos(zip(results, outputs, strict=True)))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: Any, tensors: dict[str, Tensor]) -> list[np.ndarray]:
    """What onnxruntime computes on CPU."""
    given = {name: tensor.detach().numpy() for name, tensor in tensors.items() if tensor is not None}
    return session(model).run(None, given)


def session(model: Any, profile: Path | None = None) -> Any:
    """A session on one core; with `profile`, a prefix of the file of what every operation takes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def largest_tensor(model: Any, tensors: dict[str, Tensor], folder: Path) -> int:
    """Elements of the largest tensor that an operation makes while the model runs."""
    loaded = session(model, folder / "profile")
    loaded.run(None, {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None})
    events = json.loads(Path(loaded.end_profiling()).read_text())
    shapes = [
        shape
        for event in events
        for kinds in event.get("args", {}).get("output_type_shape", [])
        for shape in kinds.values()
    ]
    return max(int(np.prod(shape)) for shape in shapes)


def _infos(named: Any) -> list[Any]:
    return [onnx.helper.make_tensor_value_info(name, _TYPES[x.dtype], [None] * x.dim()) for name, x in named]
