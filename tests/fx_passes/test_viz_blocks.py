"""Block maps: the blocks of a site are those that its op reads, and the picture holds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy.testing import assert_array_equal
from support.attention_model import Blocks, SelfAttention, tokens
from torch import Tensor

pytest.importorskip("matplotlib")

import sparseattn
from sparseattn import BlockIndex, Policy, Rule, Schedule, viz
from sparseattn.attn_ops.blocks.tiles import Tiling
from sparseattn.attn_ops.errors import ArgumentError, PolicyError
from sparseattn.attn_ops.video_layout import VideoLayout
from sparseattn.fx_passes.viz.kept_blocks import KEPT

HEADS, LENGTH, GRID, TILE = 2, 128, (2, 8, 8), (2, 4, 4)
SMALL = {"block_q": 16, "block_k": 16}
VIDEO = VideoLayout(GRID)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("block_topk", {"keep_ratio": 0.3, **SMALL}),
    ("block_topk", {"keep_ratio": [0.2, 0.7], **SMALL}),
    ("sparge", {"keep_ratio": 0.3, "block_q": 64, "block_k": 64}),
    ("sparge", {"mass": 0.3, "block_q": 64, "block_k": 64}),
    ("sla", {"sparsity": 0.6, **SMALL}),
    ("sage_sla", {"keep_ratio": [0.5, 0.9], "block_q": 64, "block_k": 64}),
    ("sta", {"tile": [1, 4, 4], "window": [1, 1, 1]}),
    ("sta", {"tile": [1, 4, 4], "window": [1, 1, 1, 2, 1, 1]}),
    ("vsa", {"tile": TILE, "sparsity": 0.5}),
    ("vsa", {"tile": TILE, "sparsity": [0.3, 0.8]}),
]
ARGUMENTS = {"keep_ratio": "keep_ratios", "sparsity": "sparsities"}


def read_by(op: Any, q: Tensor, k: Tensor, index: BlockIndex, tiling: Tiling | None, **arguments: Any) -> Tensor:
    """(B, H, nq, nk) bool: where the op's output has weight of a block of keys, by values that mark their block."""
    blocks = torch.arange(LENGTH) // index.block_k
    if tiling is not None:
        blocks = tiling.from_tiles(torch.arange(LENGTH)[:, None] // index.block_k)[:, 0]
    v = (blocks[:, None] == torch.arange(q.shape[-1])).float().expand_as(q).contiguous()
    out = op(q, k, v, **arguments)[0]
    out = out if tiling is None else tiling.to_tiles(out)
    weights = out.unflatten(2, (index.nq, index.block_q))[..., : index.nk]
    seen = weights > 0
    assert torch.equal(seen.any(dim=3), seen.all(dim=3))
    return seen.any(dim=3)


def op_arguments(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a rule as arguments of the op."""
    given = dict(params)
    for name, tensor in ARGUMENTS.items():
        if isinstance(given.get(name), list):
            given[tensor] = torch.tensor(given.pop(name))
    return given


@pytest.mark.parametrize(("name", "params"), CASES, ids=lambda value: str(value)[:40])
def test_the_blocks_of_a_site_are_those_that_its_op_reads(name: str, params: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Blocks(2, heads=HEADS), tokens(length=LENGTH, batch=2) * 4
    layout = VIDEO if name in ("sta", "vsa") else None
    policy = Policy([Rule(name, params=params, layout=layout)])
    index = viz.site_blocks(model, x, policy=policy, module="blocks.0")
    q, k, _ = (
        part.unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous() for part in model.blocks[0].qkv(x).chunk(3, -1)
    )
    op = getattr(torch.ops.sparseattn, sparseattn.backends()[name].op)
    tiling = None if layout is None else Tiling(VIDEO, tuple(params["tile"]))
    given = op_arguments({"keep_ratio": 1 - params["sparsity"], **SMALL} if name == "sla" else params)
    with torch.no_grad():
        read = read_by(op, q, k, index, tiling, **given, **({"grid": GRID} if layout else {}))
    shown = index.to_mask().expand_as(read)
    assert torch.equal(shown, read)
    assert 0 < index.density < 1


def test_every_sparse_backend_but_one_has_a_map() -> None:
    sparse = {name for name, spec in sparseattn.backends().items() if spec.kind == "sparse" and spec.selectable}
    assert sparse - set(KEPT) == {"vmoba"}


def test_the_step_decides_what_a_schedule_keeps() -> None:
    table = Schedule(kind="table", values=(1.0, 0.5))
    policy = Policy([Rule("block_topk", params={"keep_ratio": table, **SMALL})])
    for step, density in enumerate(table.values):
        with sparseattn.steps(step, 2):
            index = viz.site_blocks(SelfAttention(), tokens(), policy=policy, module="")
        assert index.density == density


def test_the_model_gives_what_it_gave() -> None:
    model, x, seen = SelfAttention(), tokens(), []
    model.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    viz.site_blocks(model, x, policy={"rules": [{"use": "block_topk", "params": SMALL}]}, module="")
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize(
    ("policy", "module", "sentence"),
    [
        ("exact", "blocks.0", r"blocks\.0: flash does not choose blocks"),
        ({"rules": []}, "blocks.1", r"blocks\.1: it stays dense \(no rule"),
        ({"rules": []}, "blocks.7", r"got 'blocks\.7'\. The model has: blocks\.0, blocks\.1\."),
    ],
)
def test_a_site_without_blocks_says_why(policy: Any, module: str, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        viz.site_blocks(Blocks(), tokens(), policy=policy, module=module)


def mask(batch: int, heads: int, nq: int, nk: int) -> Tensor:
    return torch.rand(batch, heads, nq, nk, generator=torch.Generator().manual_seed(1)) < 0.3


def test_the_picture_holds_the_mask_of_every_head() -> None:
    blocks = mask(2, 5, 7, 9)
    figure = viz.block_map(BlockIndex.from_mask(blocks, block_q=64, block_k=32), batch=1, title="blocks.0")
    assert len(figure.axes) == 5
    for head, axes in enumerate(figure.axes):
        assert_array_equal(axes.images[0].get_array(), blocks[1, head])
        assert axes.get_title() == f"head {head}: {blocks[1, head].float().mean():.1%}"
    assert figure.get_suptitle() == f"blocks.0: density {blocks[1].float().mean():.1%} over 5 heads"
    assert figure.get_supxlabel() == "block of 32 keys"
    assert figure.get_supylabel() == "block of 64 queries"


def test_some_heads_and_plain_masks() -> None:
    blocks = mask(1, 20, 4, 4)
    assert len(viz.block_map(blocks).axes) == 12
    figure = viz.block_map(blocks, heads=[19, 2])
    assert [axes.get_title().partition(":")[0] for axes in figure.axes] == ["head 19", "head 2"]
    assert figure.get_suptitle().endswith("over 20 heads, 2 shown")
    (axes,) = viz.block_map(blocks[0, 0]).axes
    assert axes.get_title() == ""
    assert_array_equal(axes.images[0].get_array(), blocks[0, 0])


def test_more_blocks_than_pixels_are_pooled() -> None:
    blocks = mask(1, 1, 1024, 600)
    (axes,) = viz.block_map(blocks).axes
    cells = axes.images[0].get_array()
    assert cells.shape == (512, 512)
    assert axes.images[0].get_extent() == [-0.5, 599.5, 1023.5, -0.5]
    assert 0 < cells.max() <= 1


@pytest.mark.parametrize(
    ("given", "arguments", "sentence"),
    [
        (torch.zeros(2, 2), {}, "mask must be bool"),
        (torch.zeros(3, 0, 4, dtype=torch.bool), {}, "index must have blocks"),
        (mask(1, 2, 4, 4), {"heads": 2}, r"heads must be numbers in 0 \.\.\. 1, got 2"),
        (mask(1, 2, 4, 4), {"heads": []}, "heads must be numbers"),
        (mask(1, 2, 4, 4), {"batch": 1}, r"batch must be in 0 \.\.\. 0, got 1"),
    ],
)
def test_a_map_that_cannot_be_drawn_says_why(given: Tensor, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        viz.block_map(given, **arguments)
