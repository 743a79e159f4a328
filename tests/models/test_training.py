"""Fine-tuning a converted diffusers model: one graph, exact gradients, and what training setups add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import sparseattn
from sparseattn import Policy, Rule, Schedule
from sparseattn.attn_ops.backends import block_topk

pytestmark = pytest.mark.models

SELF = {"modules": "*attn1", "kind": "self"}
BLOCKS = {"block_q": 16, "block_k": 16}
POLICIES = {
    "sla": Policy([Rule("sla", params={"keep_ratio": 0.25, **BLOCKS}, **SELF)]),
    "vsa": Policy([Rule("vsa", params={"sparsity": 0.5, "tile": (2, 4, 4)}, **SELF)]),
    "warm-up": Policy(
        [Rule("sla", params={"keep_ratio": Schedule(kind="linear", start=1.0, end=0.25, steps=":8"), **BLOCKS}, **SELF)]
    ),
}


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )


def batch(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    noise = partial(torch.randn, generator=generator)
    text = noise(1, 7, 16)
    return {
        "hidden_states": noise(1, 4, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": text,
        "return_dict": False,
    }


def compiled(model: nn.Module, policy: Policy, inner: str) -> Callable[..., Any]:
    options = {"policy": policy, "inner_backend": inner}
    return torch.compile(model, backend="sparseattn", fullgraph=True, options=options)


def loss_of(run: Callable[..., Any], given: dict[str, Any]) -> Tensor:
    return (run(**given)[0] - given["hidden_states"].roll(1, dims=2)).square().mean()


@pytest.mark.parametrize("name", POLICIES)
def test_twenty_steps_are_one_graph_and_learn(name: str) -> None:
    torch._dynamo.reset()
    model, policy, counters = wan(), POLICIES[name], torch._dynamo.utils.counters
    with sparseattn.steps(0, 20):
        sparseattn.convert(model, policy, batch())
    run = compiled(model, policy, "inductor" if name == "warm-up" else "aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    counters.clear()
    losses = []
    for step in sparseattn.steps(range(20)):
        loss = loss_of(run, batch(step % 2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert dict(sparseattn.last_report().chosen) == {("sla" if name == "warm-up" else name): 2, "sdpa": 2}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    added = [p for n, p in model.named_parameters() if ".sla." in n or ".vsa." in n]
    assert all(parameter.any() for parameter in added)  # they were zero, and were trained


@pytest.mark.parametrize("name", ["sla", "vsa"])
def test_gradients_are_those_of_the_graph_run_op_by_op(name: str) -> None:
    """With the inner backend "eager" the rewritten graph is not compiled."""
    model, policy = wan(), POLICIES[name]
    conversion = sparseattn.convert(model, policy, batch())
    with torch.no_grad():
        for parameter in conversion.parameters():
            parameter.normal_(std=0.2)
    grads = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        model.zero_grad()
        loss_of(compiled(model, policy, inner), batch()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == {name for name, _ in model.named_parameters()}
    for parameter, wanted in grads[0].items():
        difference = (grads[1][parameter] - wanted).norm()
        assert difference <= 1e-5 * wanted.norm() + 1e-7, parameter


@pytest.mark.parametrize("name", ["sla", "vsa"])
def test_gradient_checkpointing_of_the_model(name: str) -> None:
    policy, grads = POLICIES[name], []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model = wan().train()
        conversion = sparseattn.convert(model, policy, batch())
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in conversion.parameters():
                parameter.normal_(std=0.2)
        if checkpointing:
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(compiled(model, policy, "aot_eager"), batch())
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for got, wanted in zip(*grads, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(("saved", "runs"), [(True, 1), (False, 2)])
def test_selective_checkpointing_sees_our_ops(saved: bool, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that the policy saves runs once; one that it recomputes runs in the backward again."""
    op, ran = torch.ops.sparseattn.block_topk_attention.default, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        ran.append(1)
        return forward_kernel(*args, **kwargs)

    def save_or_not(_context: Any, called: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved and called is op else CheckpointPolicy.MUST_RECOMPUTE

    def attend(q: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q.sin(), q.cos(), q)

    def model(q: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, save_or_not)
        return checkpoint(attend, q, use_reentrant=False, context_fn=contexts).square()

    forward_kernel = block_topk.forward_kernel
    monkeypatch.setattr(block_topk, "forward_kernel", counted)
    torch._dynamo.reset()
    policy = Policy([Rule("block_topk", params={"keep_ratio": 0.5, **BLOCKS})])
    compiled(model, policy, "aot_eager")(torch.randn(1, 2, 64, 16, requires_grad=True)).sum().backward()
    assert len(ran) == runs


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_fully_sharded() -> None:
    """What is added is sharded with the block that owns it, and trains to the same losses."""
    policy, losses = POLICIES["sla"], []
    for sharded in (False, True):
        torch._dynamo.reset()
        model = wan().train()
        conversion = sparseattn.convert(model, policy, batch())
        if sharded:
            mesh = init_device_mesh("cpu", (1,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert all(isinstance(parameter, DTensor) for parameter in conversion.parameters())
        run = torch.compile(model, backend="sparseattn", options={"policy": policy, "inner_backend": "aot_eager"})
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        for step in range(4):
            loss = loss_of(run, batch(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert any(float(parameter.detach().abs().max()) > 0 for parameter in conversion.parameters())
    assert losses[:4] == losses[4:]
