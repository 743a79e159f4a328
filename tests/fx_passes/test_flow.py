"""`flow` says which dimension comes from which: checked by permuting, on graphs of Dynamo and of torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import capture, exported
from torch import Tensor, fx, nn
from torch.nn import functional

import sparseattn  # noqa: F401  (registers the ops)
from sparseattn.fx_passes.layouts.flow import flow

Function = Callable[[Tensor, Tensor], Any]


def _setitem(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., ::2], out[..., 1::2] = x[..., 1::2] * y[..., ::2], x[..., ::2]
    return out.type_as(x) + 1


FUNCTIONS: dict[str, Function] = {
    "pointwise": lambda x, y: torch.where(x > y, x.exp(), functional.gelu(-x) * y).clamp(0, 3) + x * x,
    "broadcast": lambda x, y: x + y[0, 0] + y[:, :1].sigmoid() - 2 * y[:, :, 0, None],
    "casts": lambda x, y: x.double().to(torch.float32).type_as(y).contiguous().clone().detach(),
    "linear": lambda x, y: functional.linear(x, y[0, 0], y[0, 0, :, 0]),
    "norms": lambda x, y: functional.layer_norm(x, (6,), y[0, 0, 0]) + functional.rms_norm(x, (4, 6)),
    "matmul": lambda x, y: (x @ y.mT, x.flatten(0, 2) @ y[0, 0].T, torch.bmm(x[0], y[1].transpose(1, 2))),
    "addmm": lambda x, y: (
        torch.addmm(y[0, 0, 0, :4], x[0, 0], y[0, 0].t()),
        torch.addmm(x[0, 0], x[0, 1, :, :4], y[0, 0]),
    ),
    "reductions": lambda x, y: (x.mean(-1), x.sum((1, 3), keepdim=True), torch.amax(y, 2), y.var(dim=1)),
    "softmax": lambda x, y: (x.softmax(-1), functional.log_softmax(y, dim=2)),
    "permutations": lambda x, y: (x.permute(3, 0, 2, 1), y.transpose(-1, 0), x.mT, x.swapaxes(1, 2)),
    "shapes": lambda x, y: (x.unsqueeze(1), y[:1].squeeze(0), x.unsqueeze(-1).expand(2, 3, 4, 6, 5)),
    "repeats": lambda x, y: (x.repeat(1, 1, 2, 1), x.repeat_interleave(2, dim=1), y[:, :1].expand_as(x)),
    "reshapes": lambda x, y: (x.flatten(2), x.unflatten(3, (2, -1)), x.reshape(6, 4, 6), y.view(1, 2, 3, 24)),
    "joins": lambda x, y: (torch.cat([x, y], dim=1), torch.stack([x, y, x], dim=-1), torch.stack((x, y))),
    "parts": lambda x, y: (*x.chunk(2, dim=-1), *y.split([1, 3], dim=2), *x.unbind(1), *torch.unbind(y, -1)),
    "indices": lambda x, y: (x[:, 1:], y[..., None, ::2], x[1], x[:, :, -3:, 0], y[None]),
    "pieces": lambda x, y: (x.narrow(1, 0, 2), x.select(2, 1), y.narrow(-1, 3, 3)),
    "dropout": lambda x, y: functional.dropout(x, 0.5, training=False) + functional.dropout(y, 0.0),
    "attention": lambda x, y: (
        functional.scaled_dot_product_attention(x, y, y * 2),
        functional.scaled_dot_product_attention(x, y, -x, attn_mask=(x @ y.mT) > 0),
        functional.scaled_dot_product_attention(x, y, -x, is_causal=True),
        torch.ops.sparseattn.flash_attention(x, y, x + 1),
    ),
    "written": _setitem,
}  # fmt: skip


class _Checked(fx.Interpreter):
    """Runs a graph; at every node, permutes what a dimension comes from and expects that dimension permuted."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.known, self.checked = 0, 0

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        through = flow(node) if node.op.startswith("call") else None
        self.known += through is not None
        for dim, sources in enumerate(through or ()):
            if sources and "empty" not in str(node.target):
                self._check(node, result, dim, dict(sources))
        return result

    def _check(self, node: fx.Node, result: Any, dim: int, sources: dict[fx.Node, int]) -> None:
        several = result if isinstance(result, list | tuple) else [result]
        order = torch.arange(several[0].shape[dim]).roll(1)

        def permuted(operand: fx.Node) -> Any:
            value = self.env[operand]
            if operand not in sources:
                return value
            if isinstance(value, list | tuple):  # the node takes one of them
                return [
                    part.index_select(sources[operand], order) if place == node.args[1] else part
                    for place, part in enumerate(value)
                ]
            return value.index_select(sources[operand], order)

        args, kwargs = fx.map_arg((node.args, node.kwargs), permuted)
        actual = getattr(self, node.op)(node.target, args, kwargs)
        for want, got in zip(several, actual if isinstance(actual, list | tuple) else [actual], strict=True):
            if want.dim() > dim:
                torch.testing.assert_close(got, want.index_select(dim, order), rtol=1e-4, atol=1e-5)
        self.checked += 1


@pytest.mark.parametrize("from_export", [False, True], ids=["dynamo", "export"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_permuting_the_sources_permutes_the_result(name: str, from_export: bool) -> None:
    inputs = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)

    class Model(nn.Module):
        def forward(self, x, y):
            return FUNCTIONS[name](x, y)

    graph = exported(Model(), *inputs).graph_module if from_export else capture(Model(), *inputs)
    run = _Checked(graph)
    run.run(*inputs)
    assert run.checked >= 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.roll(1, 2),
        lambda x: x.cumsum(1),
        lambda x: x.flip(0),
        lambda x: x[:, torch.tensor([1, 0])],
        lambda x: functional.dropout(x, 0.5, training=True),
        lambda x: x.sort(dim=1)[0],
        lambda x: functional.pad(x, (0, 1)),
        lambda x: x.mean(),
    ],
)
def test_other_operations_are_not_answered(function: Callable[[Tensor], Tensor]) -> None:
    graph = capture(function, torch.randn(2, 3, 4, 6))
    (output,) = graph.graph.find_nodes(op="output")
    made = output.args[0][0]
    made = made.args[0] if "getitem" in made.name and isinstance(made.args[1], int) else made
    assert flow(made) is None
