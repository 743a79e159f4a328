"""zeros_after: zeros that wait for a tensor, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseattn.attn_ops.zeros_after import ZEROS_AFTER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(), (2, 3)])
def test_opcheck(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    torch.library.opcheck(ZEROS_AFTER, (torch.randn(4, 5, dtype=dtype, requires_grad=True), size))


def test_not_a_number_leaves_no_trace() -> None:
    after = torch.full((3,), torch.nan, requires_grad=True)
    zeros = ZEROS_AFTER(after, ())
    (grad,) = torch.autograd.grad(zeros * torch.inf, after)
    assert zeros == 0
    assert torch.equal(grad, torch.zeros(3))


def test_a_compiler_keeps_it_in_forward_and_backward() -> None:
    """Inductor folds a product with 0, whatever it waits for; the gradient here must be made after that of the sum."""
    graphs: list[list[object]] = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        from functorch.compile import make_boxed_func

        graphs.append([node.target for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.compile_fx import min_cut_rematerialization_partition

        compiler = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
        return compiler(graph, inputs)

    after = torch.randn(4, requires_grad=True)
    x = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda x, after: (x.sin() + ZEROS_AFTER(after.cos(), ())).sum(), backend=backend)
    compiled(x, after).backward()
    assert [graph.count(ZEROS_AFTER) for graph in graphs] == [1, 1]
    assert torch.equal(after.grad, torch.zeros(4))
