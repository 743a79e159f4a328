"""contents: which of our ops a program calls, by whom they are computed, and on which device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from ...attn_ops.capability import Capability
from ...attn_ops.op import NAMESPACE
from ...attn_ops.registry import backends
from ...attn_ops.resolve import AUTO
from ..normalize.graph import value_of
from ..rewrite import graphs_of


@dataclass(frozen=True)
class OpCall:
    """One call of one of our ops.

    Args:
        op: its name in `torch.ops.sparseattn`.
        provider: who computes it; "auto" where that is found out when it runs.
        device: device of the query.
    """

    op: str
    provider: str
    device: torch.device

    @property
    def why_not_here(self) -> tuple[str, ...]:
        """Why the provider cannot run on this device of this machine, whatever the shapes."""
        spec = next((spec for spec in backends().values() if spec.op == self.op), None)
        if spec is None or self.provider == AUTO:
            return ()
        return tuple(spec.provider(self.provider).support.why_not_on(Capability.current(self.device)))

    def __str__(self) -> str:
        return f"{self.op} by {self.provider}"


def op_calls(program: ExportedProgram) -> list[OpCall]:
    """Every call of our ops in a program and its sub-graphs, in graph order."""
    graphs = graphs_of(program.graph_module)
    return [_read(node) for graph in graphs for node in graph.graph.nodes if _is_ours(node)]


def _is_ours(node: fx.Node) -> bool:
    return (
        isinstance(node.target, OpOverload) and node.target.namespace == NAMESPACE and bool(node.target._schema.returns)
    )


def _read(node: fx.Node) -> OpCall:
    target = node.target
    assert isinstance(target, OpOverload)
    return OpCall(
        target._schema.name.partition("::")[2], str(node.kwargs.get("provider", AUTO)), value_of(node.args[0]).device
    )
