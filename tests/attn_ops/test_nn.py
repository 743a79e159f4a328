"""sparseattn.nn: modules with the names and the parameters of the published ones."""

from __future__ import annotations

import pytest
import torch
from support.sla_paper import paper_sla
from torch import Tensor

import sparseattn
from sparseattn.attn_ops.errors import ArgumentError, GradientError
from sparseattn.nn import SageSparseLinearAttention, SparseLinearAttention

DIM = 32


def inputs(length: int = 256, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, 2, length, DIM, dtype=dtype) for _ in range(3))
    return q, k, v


def trained(module: SparseLinearAttention) -> SparseLinearAttention:
    """With the weights of a state dict as the published module writes it."""
    state = {"proj_l.weight": torch.randn(DIM, DIM) / DIM**0.5, "proj_l.bias": torch.randn(DIM)}
    assert str(module.load_state_dict(state)) == "<All keys matched successfully>"
    return module


def test_it_is_reached_as_a_module_and_as_an_attribute() -> None:
    assert sparseattn.nn.SparseLinearAttention is SparseLinearAttention


@pytest.mark.parametrize("module", [SparseLinearAttention, SageSparseLinearAttention])
def test_parameters_are_the_published_ones_and_zero(module: type[SparseLinearAttention]) -> None:
    fresh = module(DIM, 0.1, "elu", 64, 64, True, True)
    state = fresh.state_dict()
    assert {name: (tuple(x.shape), x.dtype) for name, x in state.items()} == {
        "proj_l.weight": ((DIM, DIM), torch.float32),
        "proj_l.bias": ((DIM,), torch.float32),
    }
    assert not any(x.any() for x in state.values())
    assert (fresh.topk, fresh.BLKQ, fresh.BLKK) == (0.1, 64, 64)


@pytest.mark.parametrize("variant", ["all", "complement"])
def test_trained_weights_give_what_the_paper_says(variant: str) -> None:
    module, given = trained(SparseLinearAttention(DIM, 0.5, use_bf16=None, variant=variant)), inputs()
    weights = [x.detach().double() for x in (module.proj_l.weight, module.proj_l.bias)]
    exact, _ = paper_sla(*(x.double() for x in given), *weights, keep=2, variant=variant)
    torch.testing.assert_close(module(*given).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_fresh_module_is_its_sparse_part() -> None:
    given = inputs()
    sparse, _ = torch.ops.sparseattn.sparse_linear_attention(*given)
    assert torch.equal(SparseLinearAttention(DIM, 0.1, use_bf16=None)(*given), sparse)


@pytest.mark.parametrize(("use_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_it_computes_in_half_precision_and_returns_the_dtype_given(use_bf16: bool, dtype: torch.dtype) -> None:
    module, given = trained(SparseLinearAttention(DIM, 0.5, use_bf16=use_bf16)), inputs()
    out = module(*given)
    assert out.dtype is torch.float32
    assert torch.equal(out, module(*(x.to(dtype) for x in given)).float())


def test_sparsity_is_what_is_left_out_not_what_is_kept() -> None:
    """The published module returns the fraction that is kept, under this name."""
    module = SparseLinearAttention(DIM, 0.25)
    out, sparsity = module(*inputs(), return_sparsity=True)
    assert out.shape == (1, 2, 256, DIM)
    assert sparsity == 0.75
    assert SparseLinearAttention(DIM, 0.01)(*inputs(100), return_sparsity=True)[1] == 0.5


def test_it_trains_from_zero() -> None:
    torch.manual_seed(1)
    module, given = SparseLinearAttention(DIM, 0.25, use_bf16=None), inputs()
    target = torch.nn.functional.scaled_dot_product_attention(*given)
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=3e-3), []
    for _ in range(20):
        loss = (module(*given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.any() for parameter in module.parameters())
    assert losses[-1] < losses[0]


def test_it_compiles_in_one_graph_forward_and_backward() -> None:
    module, given = trained(SparseLinearAttention(DIM, 0.25, use_bf16=None)), inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    module(*given).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    compiled(*given).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in module.parameters()], wanted)


def test_the_quantized_module_takes_the_trained_weights_and_refuses_to_train() -> None:
    exact, given = trained(SparseLinearAttention(DIM, 0.5, BLKQ=128, use_bf16=None)), inputs()
    module = SageSparseLinearAttention(DIM, 0.5, use_bf16=None)
    module.load_state_dict(exact.state_dict())
    with pytest.raises(GradientError, match="Train with sparse_linear_attention"):
        module(*given)
    with torch.no_grad():
        out, want = module(*given), exact(*given)
    assert 0 < (out - want).norm() / want.norm() < 0.02


def test_unknown_choices_are_named_when_it_is_made() -> None:
    with pytest.raises(ArgumentError, match="SparseLinearAttention: feature_map must be one of softmax, elu, relu"):
        SparseLinearAttention(DIM, 0.1, "hedgehog")
    with pytest.raises(ArgumentError, match="SageSparseLinearAttention: variant must be one of all, complement"):
        SageSparseLinearAttention(DIM, 0.1, variant="rest")


def test_it_says_what_it_is() -> None:
    assert "topk=0.1, softmax, BLKQ=64, BLKK=64, variant=all" in str(SparseLinearAttention(DIM, 0.1))
