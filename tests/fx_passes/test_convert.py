"""convert: parameters added to a model by tracing it, used by the compiled graph, and taken away again."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, SelfAttention, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparseattn
from sparseattn import Policy, Rule
from sparseattn.attn_ops.errors import PolicyError

TILES, GRID = {"tile": (2, 4, 4), "sparsity": 0.5}, (4, 4, 8)
SLA = Policy([Rule("sla", params={"keep_ratio": 0.25, "block_q": 16, "block_k": 16})])
VSA = Policy([Rule("vsa", params=TILES, layout=GRID)])
POLICIES = {"sla": SLA, "vsa": VSA}


def compiled(model: nn.Module, policy: Policy, inner: str = "aot_eager") -> Any:
    options = {"policy": policy, "inner_backend": inner}
    return torch.compile(model, backend="sparseattn", fullgraph=True, options=options)


def by_hand(block: nn.Module, x: Tensor, use: str) -> Tensor:
    """A converted SelfAttention, by the ops."""
    q, k, v = (part.unflatten(-1, (block.heads, -1)).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1))
    if use == "sla":
        projection = block.sla.proj_l
        given = {"keep_ratio": 0.25, "block_q": 16, "block_k": 16}
        out = sparseattn.ops.sparse_linear_attention(q, k, v, projection.weight, projection.bias, **given)[0]
    else:
        gate = block.vsa.to_gate_compress(x).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        out = sparseattn.ops.video_sparse_attention(q, k, v, gate, grid=GRID, **TILES)[0]
    return out.transpose(1, 2).flatten(2)


def randomize(conversion: sparseattn.Conversion) -> None:
    with torch.no_grad():
        for parameter in conversion.parameters():
            parameter.normal_(std=0.3)


def video(**how: Any) -> Tensor:
    return tokens(length=128, **how)


@pytest.mark.parametrize(
    ("use", "names"),
    [
        ("sla", ["sla.proj_l.weight", "sla.proj_l.bias"]),
        ("vsa", ["vsa.to_gate_compress.weight", "vsa.to_gate_compress.bias"]),
    ],
)
def test_what_is_added(use: str, names: list[str]) -> None:
    model = Blocks().to(torch.bfloat16)
    before = set(model.state_dict())
    conversion = sparseattn.convert(model, POLICIES[use], (video().bfloat16(),))
    added = [f"blocks.{layer}.{name}" for layer in range(2) for name in names]
    assert [name for name, _ in conversion.named_parameters()] == added
    assert set(model.state_dict()) - before == set(added)
    assert set(added) <= {name for name, _ in model.named_parameters()}
    for parameter in conversion.parameters():
        assert parameter.dtype is torch.bfloat16
        assert not parameter.any()
    assert next(model.float().blocks[1].children()).weight.dtype is next(conversion.parameters()).dtype is torch.float32
    assert "2 attention sites converted" in str(conversion)


@pytest.mark.parametrize("use", POLICIES)
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_the_compiled_graph_uses_them(use: str, inner: str) -> None:
    model, x = Blocks(), video()
    randomize(sparseattn.convert(model, POLICIES[use], (x,)))
    out = compiled(model, POLICIES[use], inner)(x)
    out.square().sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    wanted = x
    for block in model.blocks:
        wanted = wanted + by_hand(block, wanted, use)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    wanted.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
    assert f"with its {'gate' if use == 'vsa' else 'weight and bias'}" in str(sparseattn.last_report())


@pytest.mark.parametrize("use", POLICIES)
def test_zero_is_the_method_without_training(use: str) -> None:
    model, x = Blocks(), video()
    with torch.no_grad():
        free = compiled(model, POLICIES[use])(x)
        assert "training-free, without" in str(sparseattn.last_report())
        sparseattn.convert(model, POLICIES[use], (x,))
        torch.testing.assert_close(compiled(model, POLICIES[use])(x), free)


@pytest.mark.parametrize("use", POLICIES)
def test_a_model_that_is_not_compiled_is_as_before(use: str) -> None:
    model, x = Blocks(), video()
    with torch.no_grad():
        dense = model(x)
        randomize(sparseattn.convert(model, POLICIES[use], (x,)))
        assert torch.equal(model(x), dense)
        for options in ({"backend": "inductor"}, {"backend": "sparseattn", "options": {"policy": "exact"}}):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(model, fullgraph=True, **options)(x), dense)


class Checkpointed(Blocks):
    """The blocks, each under activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("use", POLICIES)
def test_under_checkpointing_and_autocast(use: str) -> None:
    model, x = Checkpointed(), video()
    randomize(sparseattn.convert(model, POLICIES[use], (x,)))
    plain = Blocks()
    plain.load_state_dict(model.state_dict(), strict=False)
    randomize(sparseattn.convert(plain, POLICIES[use], (x,)))
    plain.load_state_dict(model.state_dict())
    grads = []
    for each in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(each, POLICIES[use])(x)
        out.float().square().sum().backward()
        grads.append([parameter.grad for parameter in each.parameters()])
    for got, wanted in zip(*grads, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("use", POLICIES)
def test_only_the_added_parameters_may_be_trained(use: str) -> None:
    """Then no site has an input that requires a gradient, and all but the first need one all the same."""
    model, x = Blocks().requires_grad_(False), video()
    conversion = sparseattn.convert(model, POLICIES[use], (x,))
    randomize(conversion)
    optimizer = torch.optim.AdamW(conversion.parameters(), lr=1e-2, fused=True)
    run, losses = compiled(model, POLICIES[use]), []
    for _ in range(5):
        loss = run(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(row.call.needs_grad for row in sparseattn.last_report().rows)


def test_gradients_accumulate() -> None:
    model, x = Blocks(), video(batch=4)
    randomize(sparseattn.convert(model, SLA, (x[:2],)))
    run = compiled(model, SLA)
    run(x).square().sum().backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for half in x.chunk(2):
        run(half).square().sum().backward()
    for parameter, wanted in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use", POLICIES)
def test_removing_leaves_the_model_as_it_was(use: str) -> None:
    model, x = Blocks(), video()
    names, text = list(model.state_dict()), str(model)
    conversion = sparseattn.convert(model, POLICIES[use], (x,))
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for each in (twin, loaded):  # a copy hands over its own
        next(each.blocks[0].children())
        assert each.blocks[0]._forward_pre_hooks
        assert sparseattn.unconvert(each) == [f"blocks.{layer}.{use}" for layer in range(2)]
    conversion.remove()
    for each in (model, twin, loaded):
        assert (list(each.state_dict()), str(each)) == (names, text)
        assert not any(module._forward_pre_hooks for module in each.modules())
        assert not any(module._forward_pre_hooks_with_kwargs for module in each.modules())
    sparseattn.convert(model, POLICIES[use], (x,))


def test_checkpoints() -> None:
    """A dense one loads with strict=False, one with all parameters as it is."""
    model, other, x = Blocks(), Blocks(), video()
    dense = copy.deepcopy(model.state_dict())
    randomize(sparseattn.convert(model, SLA, (x,)))
    sparseattn.convert(other, SLA, (x,))
    missing = other.load_state_dict(dense, strict=False)
    assert set(missing.missing_keys) == set(model.state_dict()) - set(dense)
    assert not missing.unexpected_keys
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(compiled(other, SLA)(x), compiled(model, SLA)(x))


def upstream(layers: int, dim: int = 16) -> dict[str, Tensor]:
    """State of a model with upstream's modules; layer 10 comes after layer 2."""
    modules = {f"net.blocks.{i}.self_attn.attn_op.local_attn.proj_l": nn.Linear(dim, dim) for i in range(layers)}
    state = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    return dict(sorted(state.items())) | {"net.blocks.0.self_attn.q_proj.weight": torch.zeros(3, 3)}


def test_projections_of_published_modules_are_loaded() -> None:
    model, state = Blocks(layers=11), upstream(11)
    conversion = sparseattn.convert(model, SLA, (video(),))
    loaded = conversion.load_trained(state)
    assert len(loaded) == 22
    for layer in range(11):
        for key in ("weight", "bias"):
            theirs = state[f"net.blocks.{layer}.self_attn.attn_op.local_attn.proj_l.{key}"]
            assert torch.equal(getattr(model.blocks[layer].sla.proj_l, key), theirs)
    assert loaded["blocks.10.sla.proj_l.bias"] == "net.blocks.10.self_attn.attn_op.local_attn.proj_l.bias"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "has no tensor named"),
        (upstream(1), "the checkpoint has 2 tensors of proj_l, the model has 4"),
        (upstream(2, dim=8), r"have the shapes \(16,\) and \(8,\)"),
    ],
)
def test_projections_that_do_not_fit_are_refused(state: dict[str, Tensor], says: str) -> None:
    conversion = sparseattn.convert(Blocks(), SLA, (video(),))
    with pytest.raises(PolicyError, match=says):
        conversion.load_trained(state)
    assert not any(parameter.any() for parameter in conversion.parameters())


class Twice(SelfAttention):
    """Two attentions in one module."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Bare(nn.Module):
    """Attention without a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """A module inside a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    ("model", "policy", "says"),
    [
        (Blocks(), Policy.preset("exact"), "no site becomes sla, sage_sla, vsa"),
        (Model(Twice()), SLA, "inner has several attention sites"),
        (SelfAttention(), SLA, "is in no module of the model"),
        (Model(Bare()), VSA, "inner has no Linear to read the channels of its gate from"),
        (Blocks(), "exakt", 'Did you mean "exact"'),
    ],
)
def test_what_cannot_be_converted_is_refused_and_unchanged(model: nn.Module, policy: Any, says: str) -> None:
    names = list(model.state_dict())
    with pytest.raises(PolicyError, match=says):
        sparseattn.convert(model, policy, (video(),))
    assert list(model.state_dict()) == names


def test_converting_twice_is_refused() -> None:
    model = Blocks()
    conversion = sparseattn.convert(model, SLA, {"x": video()})
    with pytest.raises(PolicyError, match=r"has an attribute 'sla' already\. Was it converted before?"):
        sparseattn.convert(model, SLA, (video(),))
    assert len(list(conversion.parameters())) == 4
    assert list(model.blocks[0].sla.parameters())


class Joint(SelfAttention):
    """Attends to more tokens than it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x], dim=1))[:, : x.shape[1]]


def test_a_gate_that_does_not_fit_is_refused_and_removed() -> None:
    model = Model(Joint())
    policy = Policy([Rule("vsa", params=TILES, layout=(8, 4, 8))])
    with pytest.raises(PolicyError, match="its attention has 256 tokens"):
        sparseattn.convert(model, policy, (video(),))
    assert not hasattr(model.inner, "vsa")
    assert not model.inner._forward_pre_hooks
