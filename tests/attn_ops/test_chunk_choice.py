"""The chunks that queries choose: against the definition, and against the published algorithm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.video_chunks import CHOICES, CHUNKS, inputs, rule_of, tiling_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseattn.attn_ops.blocks.chunk_choice import ChunkRule, choose_chunks, chunk_gates, own_chunks
from sparseattn.attn_ops.reference import vmoba as reference


def chosen(q: Tensor, k: Tensor, chunks: str, choice: str, compat: bool = False) -> Tensor:
    tiling = tiling_of(chunks)
    gates = chunk_gates(q, tiling.to_tiles(k), tiling.sizes(q.device))
    return choose_chunks(gates, own_chunks(tiling, q.device), rule_of(choice, compat))


def published(q: Tensor, k: Tensor, chunks: str, choice: str) -> Tensor:
    """(B, H, S, C) bool: the published algorithm on a batch packed into one sequence, as a map of (chunk, head, token).

    Of another video it selects what it would, and drops that.
    """
    tiling, rule = tiling_of(chunks), rule_of(choice)
    (batch, heads, length, _), per_video = q.shape, tiling.tiles
    chunk = reference.chunk_of_token(tiling)
    chunk = torch.cat([chunk + video * per_video for video in range(batch)])
    q_, k_ = (x.transpose(0, 1).reshape(heads, batch * length, -1) for x in (q, k))
    total = batch * per_video
    means = torch.stack([k_[:, chunk == number].mean(dim=1) for number in range(total)])
    gate = torch.einsum("chd,hsd->chs", means, q_)
    own = (chunk == torch.arange(total)[:, None])[:, None, :].expand_as(gate)
    video = torch.arange(batch * length) // length
    valid = (torch.arange(total)[:, None] // per_video == video)[:, None, :].expand_as(gate)
    select = _published_topk if rule.select == "topk" else _published_threshold
    picked = select(gate, own, valid, rule) & valid & ~own
    if not picked.any():
        picked = valid
    mask = (picked | own).view(batch, per_video, heads, batch, length)
    return torch.stack([mask[item, :, :, item].permute(1, 2, 0) for item in range(batch)])


def _published_topk(gate: Tensor, own: Tensor, valid: Tensor, rule: ChunkRule) -> Tensor:
    total, heads, length = gate.shape
    gate = (gate + 1e9 * own).masked_fill(~valid, -torch.inf)
    topk = min(rule.topk, total)
    if rule.threshold_type == "query_head":
        groups, many = gate.permute(1, 2, 0).reshape(-1, total), topk
    elif rule.threshold_type == "overall":
        groups, many = gate.reshape(1, -1), topk * heads * length
    else:
        groups, many = gate.transpose(0, 1).reshape(heads, -1), topk * length
    picked = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(many, dim=-1).indices, True)
    if rule.threshold_type == "query_head":
        return picked.view(heads, length, total).permute(2, 0, 1)
    return picked.view(gate.shape) if len(picked) == 1 else picked.view(heads, total, length).transpose(0, 1)


def _published_threshold(gate: Tensor, own: Tensor, valid: Tensor, rule: ChunkRule) -> Tensor:
    total, heads, length = gate.shape
    rows: dict[str, list[Any]] = {
        "query_head": [(slice(None), h, s) for h in range(heads) for s in range(length)],
        "block": [(c,) for c in range(total)],
        "overall": [(slice(None),)],
        "head_global": [(slice(None), h) for h in range(heads)],
    }
    picked = torch.zeros_like(own)
    for row in rows[rule.threshold_type]:
        gates, mine, real = gate[row].flatten(), own[row].flatten(), valid[row].flatten()
        low, high = gates[real].min(), gates[real].max()
        span = high - low if high - low > 1e-6 else torch.tensor(1.0)
        weight = ((gates - low) / span) * real
        mass = weight.sum() + 1e-6
        need = max(0.0, rule.threshold - float(weight[mine].sum() / mass))
        others = weight.masked_fill(mine, 0.0)
        order = others.sort(descending=True, stable=True).indices
        reached = (others[order].cumsum(0) / mass >= need).nonzero()
        end = len(gates) - 1 if rule.threshold_type in ("overall", "head_global") else 1
        last = int(reached[0]) if len(reached) else end
        flat = torch.zeros_like(mine)
        flat[order[: last + 1]] = True
        picked[row] = flat.view(picked[row].shape)
    return picked


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("compat", [False, True])
def test_chosen_chunks_are_those_of_the_definition(chunks: str, choice: str, compat: bool) -> None:
    q, k, _ = inputs(chunks)
    exact = reference.chosen_chunks(q.double(), k.double(), tiling=tiling_of(chunks), rule=rule_of(choice, compat))
    assert torch.equal(chosen(q, k, chunks, choice, compat), exact)


@pytest.mark.parametrize("chunks", [name for name in CHUNKS if name != "one chunk"])
@pytest.mark.parametrize("choice", CHOICES)
def test_compat_is_the_published_algorithm_on_a_packed_batch(chunks: str, choice: str) -> None:
    q, k, _ = inputs(chunks)
    assert torch.equal(chosen(q, k, chunks, choice, compat=True), published(q, k, chunks, choice))


@pytest.mark.parametrize("chunks", ["temporal", "clipped"])
@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "topk 1"])
def test_of_one_video_the_published_algorithm_is_ours(chunks: str, choice: str) -> None:
    q, k, _ = (x[:1] for x in inputs(chunks))
    assert torch.equal(chosen(q, k, chunks, choice), published(q, k, chunks, choice))


def test_topk_1_is_the_own_chunk() -> None:
    q, k, _ = inputs("spatial")
    own = own_chunks(tiling_of("spatial"), q.device)
    assert torch.equal(chosen(q, k, "spatial", "topk 1"), own.expand(*q.shape[:2], -1, -1))


@pytest.mark.parametrize("kind", ["query_head", "block", "overall", "head_global"])
def test_a_threshold_out_of_reach_takes_everything_and_upstream_sometimes_two(kind: str) -> None:
    q, k, _ = (torch.zeros_like(x[:1]) for x in inputs("both"))  # all gates are equal, and their scaled sum is 0
    assert chosen(q, k, "both", f"0.3 {kind}").all()
    compat = chosen(q, k, "both", f"0.3 {kind}", compat=True)
    assert torch.equal(compat, published(q, k, "both", f"0.3 {kind}"))
    assert compat.all() == (kind in ("overall", "head_global"))


def test_at_least_one_other_chunk_is_chosen() -> None:
    q, k, _ = inputs("both")
    assert (chosen(q, k, "both", "0.0 query_head").sum(dim=-1) >= 2).all()


def test_ties_go_to_the_lower_chunk() -> None:
    q, k, _ = inputs("temporal")
    ties = chosen(torch.zeros_like(q), k, "temporal", "topk")
    assert torch.equal(ties[0, 0, 0], torch.tensor([True, True, False]))
    assert torch.equal(ties[0, 0, -1], torch.tensor([True, False, True]))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("compat", [False, True])
def test_no_device_is_waited_for(choice: str, compat: bool) -> None:
    """A fake tensor has no values: reading one on the host would raise."""
    with FakeTensorMode():
        q, k, _ = inputs("clipped")
        assert chosen(q, k, "clipped", choice, compat).shape == (*q.shape[:3], tiling_of("clipped").tiles)
