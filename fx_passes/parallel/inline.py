"""Write a function of tensors into a graph: its operators, traced on the values of their operands, before a node.

Sizes become numbers: a symbolic one among the operands is fixed, with a guard where Dynamo is compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..normalize.graph import value_of


def inline(
    anchor: fx.Node, function: Callable[..., Sequence[Tensor]], operands: Sequence[fx.Node], *, like: fx.Node
) -> list[fx.Node]:
    """Make the nodes of a call before `anchor`.

    Args:
        anchor: the node to write before.
        function: takes the operands' tensors, gives some.
        operands: nodes in front of it.
        like: has the meta that the nodes get, but for their values, and a gradient if one flows through them.

    Returns:
        The nodes of the results.
    """
    key = "example_value" if "example_value" in like.meta else "val"
    mode = value_of(operands[0]).fake_mode
    with mode, torch.set_grad_enabled(value_of(like).requires_grad):
        values = [_fixed(value_of(operand)) for operand in operands]
        traced = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    copies: dict[fx.Node, fx.Node] = {}
    feeds = iter(operands)
    with anchor.graph.inserting_before(anchor):
        for step in traced.graph.nodes:
            if step.op == "placeholder":
                copies[step] = next(feeds)
            elif step.op != "output":
                copies[step] = anchor.graph.node_copy(step, copies.__getitem__)
                copies[step].meta = {**like.meta, key: step.meta["val"]}
    (results,) = traced.graph.output_node().args
    assert isinstance(results, list | tuple)
    return [copies[result] for result in results if isinstance(result, fx.Node)]


def _fixed(value: Tensor) -> Tensor:
    """The same tensor, with sizes that are numbers."""
    sizes, strides = [int(size) for size in value.shape], [int(stride) for stride in value.stride()]
    fixed = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return fixed.requires_grad_(value.requires_grad)
