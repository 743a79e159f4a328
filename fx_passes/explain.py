"""explain: what the policy would do to a model, on any machine, without running it.

The model is traced by Dynamo as torch.compile would; the graphs are decided upon and never executed: each returns
zeros of the right shape, so that tracing can go on after a graph break.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed

from ..attn_ops.capability import Capability
from ..attn_ops.errors import SparseAttnError
from ..lowering.precedence import effective_policy
from .normalize.graph import value_of
from .notes import measured_elsewhere, unmatched_rules
from .parallel.price import price
from .report import Report
from .rewrite import rewrite_graph
from .step_values import StepValues, with_room


def explain(
    model: Callable[..., Any],
    *args: Any,
    policy: Any = None,
    capability: str | Capability | None = None,
    dynamic: bool | None = None,
    mesh: Sequence[int] | None = None,
    **kwargs: Any,
) -> Report:
    """Decide every attention site of a model without running it.

    Args:
        model: a module or function.
        args: its example inputs; shapes and dtypes matter, values do not.
        policy: a preset name, a path, a dict or a Policy; None as in torch.compile ("auto" if nothing else is set).
        capability: the machine to decide for, "sm90" or a Capability; None means this one.
        dynamic: as in torch.compile.
        mesh: also predict what attention costs on so many GPUs, that need not be here: (ranks,) or (ring, ulysses).
        kwargs: its keyword inputs.

    Returns:
        The Report that compiling with this policy on that machine would give. Its notes tell which rules match nothing
        in the model, and whether the policy was measured on another one.

    Raises:
        PolicyError: if the policy or the mesh is not valid, or nothing is known of the links of such machines.
        ParallelError: if the ranks of the mesh cannot share a site.
        RequirementError: if a rule with mode="require" cannot be met.
    """
    chosen = effective_policy(policy)
    machine = Capability.of(capability) if isinstance(capability, str) else capability
    reports: list[Report] = []

    def decide_only(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        shapes = [value_of(node) for node in gm.graph.find_nodes(op="output")[0].args[0]]
        if chosen is not None:
            gm = with_room(gm) if chosen.varies else gm
            reports.append(rewrite_graph(gm, chosen, machine, values=StepValues(gm)))
        return lambda *_: [_zeros(value) for value in shapes]

    try:
        # Dynamo remembers sizes by source line: a model explained before would make this one's sizes symbolic.
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            torch.compile(_fresh(_call), backend=decide_only, dynamic=dynamic)(model, args, kwargs)
    except BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, SparseAttnError):
            raise failure.inner_exception from None
        raise
    if chosen is None or not reports:
        return Report(policy="disabled")
    report = sum(reports[1:], reports[0])
    report = replace(report, notes=(*unmatched_rules(chosen, report.rows), *measured_elsewhere(chosen, model)))
    return report if mesh is None else price(report, mesh, machine or Capability.current())


def traced_afresh(
    model: Callable[..., Any], backend: str | Callable[..., Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The model compiled by a backend as if for the first time: it neither counts as a recompilation nor finds one."""
    compiled = torch.compile(_fresh(_call), backend=backend, options=options)
    return lambda *args, **kwargs: compiled(model, args, kwargs)


def _call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: Dynamo counts recompilations per code object, and explaining is not one."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _zeros(value: object) -> object:
    if not isinstance(value, Tensor):
        return int(value) if isinstance(value, torch.SymInt) else value
    sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)
