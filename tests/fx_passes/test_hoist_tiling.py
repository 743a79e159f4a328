"""Hoisted tiling: the same results with fewer tensors reordered, what it goes through, and what stops it."""

from __future__ import annotations

import logging

import pytest
import torch
from support.graphs import capture, compiled, count, listing
from support.zoo import ZOO, build
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sparseattn
from sparseattn.fx_passes.hoist_tiling import Hoisted, hoist_tiling
from sparseattn.fx_passes.rewrite import rewrite_graph

GRID, TILE = (2, 4, 6), (1, 2, 3)
S, HEADS, CHANNELS = 48, 2, 16
VSA = {"rules": [{"use": "vsa", "kind": "self", "params": {"tile": TILE, "sparsity": 0.5}}]}
DENSE_TILES = {"rules": [{"use": "vsa", "kind": "self", "params": {"tile": TILE, "sparsity": 0.0}}]}
STA = {"rules": [{"use": "sta", "kind": "self", "params": {"tile": TILE, "window": [1, 3, 1]}}]}
PERMUTE = torch.ops.aten.permute.default
OPS = [getattr(torch.ops.sparseattn, name).default for name in ("video_sparse_attention", "sliding_tile_attention")]


class Block(nn.Module):
    """Modulated pre-norm block: self-attention with rotary embedding, cross-attention to text, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.norm_q = nn.RMSNorm(CHANNELS)
        self.to_q, self.to_kv = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, 2 * CHANNELS)
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 32), nn.GELU(), nn.Dropout(0.0), nn.Linear(32, CHANNELS))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([one * rope.cos() - two * rope.sin(), one * rope.sin() + two * rope.cos()], -1).flatten(-2)

    def attend(self, x: Tensor, rope: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = (self.rotate(self.heads(part), rope).type_as(v) for part in (self.norm_q(q), k))
        return functional.scaled_dot_product_attention(q, k, self.heads(v)).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, text: Tensor, rope: Tensor, shift: Tensor) -> Tensor:
        x = x + self.attend(functional.layer_norm(x, (CHANNELS,)) + shift[:, None], rope)
        k, v = map(self.heads, self.to_kv(text).chunk(2, dim=-1))
        cross = functional.scaled_dot_product_attention(self.heads(self.to_q(x)), k, v)
        x = x + self.out(cross.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Patches of a video, blocks, and back to a video. A test replaces `between` two blocks."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, CHANNELS, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.rope = nn.Parameter(torch.randn(1, 1, *GRID, CHANNELS // HEADS // 2))

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, video: Tensor, text: Tensor, shift: Tensor) -> Tensor:
        x = self.patches(video).flatten(2).transpose(1, 2)
        rope = self.rope.flatten(2, 4)
        for number, block in enumerate(self.blocks):
            x = block(self.between(x) if number else x, text, rope, shift)
        return x.transpose(1, 2).unflatten(2, GRID)


def _inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 3, *GRID), torch.randn(batch, 5, CHANNELS), torch.randn(batch, CHANNELS)


def _compiled(model: nn.Module, policy: object = VSA, **options: object) -> nn.Module:
    torch._dynamo.reset()
    dynamic = options.pop("dynamic", None)
    given = {"policy": policy, "inner_backend": "aot_eager", **options}
    return torch.compile(model, backend="sparseattn", options=given, fullgraph=True, dynamic=dynamic)


def _both(model: nn.Module, *inputs: Tensor, policy: object = VSA, **options: object) -> Hoisted:
    """Run with and without hoisting, compare, and return what was hoisted."""
    with torch.no_grad():
        torch.manual_seed(1)
        expected = _compiled(model, policy, hoist_tiling=False, **options)(*inputs)
        assert sparseattn.last_report().hoisted == Hoisted()
        assert sparseattn.last_report().rewritten > 0
        torch.manual_seed(1)
        actual = _compiled(model, policy, **options)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return sparseattn.last_report().hoisted


def _rewritten(model: nn.Module, *inputs: Tensor, policy: object = VSA) -> torch.fx.GraphModule:
    module = capture(model.eval(), *inputs)
    rewrite_graph(module, sparseattn.Policy.load(policy), hoist=False)
    return module


@pytest.mark.parametrize("policy", [VSA, STA], ids=["vsa", "sta"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_two_permutations_and_one_of_the_table_are_left_however_many_layers(layers: int, policy: object) -> None:
    model = Transformer(layers).eval()
    assert _both(model, *_inputs(), policy=policy) == Hoisted(layers, 4 * layers, 3)
    module = _rewritten(model, *_inputs(), policy=policy)
    assert hoist_tiling(module) == Hoisted(layers, 4 * layers, 3)
    assert count(module, PERMUTE) == 3
    sites = [node for node in module.graph.nodes if node.target in OPS]
    assert len(sites) == layers
    assert all(site.kwargs["tiled"] is True for site in sites)


def test_a_second_time_changes_nothing() -> None:
    module = _rewritten(Transformer(), *_inputs())
    hoist_tiling(module)
    before = listing(module)
    assert hoist_tiling(module) == Hoisted()
    assert listing(module) == before


def test_gradients_are_the_same() -> None:
    model, inputs, grads = Transformer(), _inputs(), []
    for hoist in (False, True):
        model.zero_grad()
        _compiled(model, hoist_tiling=hoist)(*inputs).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert sparseattn.last_report().hoisted.sites == 3
    for expected, actual in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_inductor_gives_the_same() -> None:
    model, inputs = Transformer(2).eval(), _inputs(1)
    with torch.no_grad():
        expected = _compiled(model, hoist_tiling=False)(*inputs)
        actual = _compiled(model, inner_backend="inductor")(*inputs)
    assert sparseattn.last_report().hoisted.sites == 2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(outside: bool) -> None:
    class Inside(Transformer):
        def forward(self, *inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(*inputs)

    model, inputs = (Transformer() if outside else Inside()).eval(), _inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        assert _both(model, *inputs).sites == 3


def test_dynamic_sizes_compile_again_for_another_grid() -> None:
    class Any(Transformer):
        def forward(self, video, text, shift):
            x = self.patches(video).flatten(2).transpose(1, 2)
            rope = self.rope.flatten(2, 4)[:, :, : x.shape[1]]
            for block in self.blocks:
                x = block(x, text, rope, shift)
            return x.transpose(1, 2)

    model = Any(1).eval()
    run = _compiled(model, DENSE_TILES, dynamic=True)
    for grid in ((2, 4, 6), (2, 2, 12), (2, 2, 6)):
        inputs = torch.randn(2, 3, *grid), *_inputs()[1:]
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
        assert sparseattn.last_report().rows[0].decision.layout.grid == grid
        assert sparseattn.last_report().hoisted.sites == 1


def test_an_exported_program() -> None:
    model, inputs = Transformer().eval(), _inputs()
    program = torch.export.export(model, inputs)
    report = rewrite_graph(program.graph_module, sparseattn.Policy.load(DENSE_TILES))
    assert report.hoisted == Hoisted(3, 12, 3)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_are_hoisted_one_by_one() -> None:
    class Checkpointed(Transformer):
        def forward(self, video, text, shift):
            x = self.patches(video).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = checkpoint(block, x, text, self.rope.flatten(2, 4), shift, use_reentrant=False)
            return x

    model, inputs = Checkpointed(2), _inputs()
    expected = _compiled(model, hoist_tiling=False)(*inputs)
    actual = _compiled(model)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert sparseattn.last_report().hoisted == Hoisted(2, 8, 6)


def test_dense_layers_between_stay_in_tile_order() -> None:
    rules = [{"use": use, "modules": "blocks.1", "kind": "self"} for use in ("dense", "flash")]
    for rule in rules:
        assert _both(Transformer().eval(), *_inputs(), policy={"rules": [rule, *VSA["rules"]]}) == Hoisted(2, 8, 3)


def test_other_results_of_the_op_and_shape_questions() -> None:
    class Asking(Transformer):
        def between(self, x):
            batch, tokens, channels = x.size()
            return x.view(batch, tokens, 2, channels // 2).flatten(2).type_as(x).contiguous()

    assert _both(Asking().eval(), *_inputs()) == Hoisted(3, 12, 3)


class Shifted(Transformer):
    def between(self, x):
        return x + x.roll(1, dims=1)


class Pooled(Transformer):
    def between(self, x):
        return x + x.mean(dim=1, keepdim=True)


class Positioned(Transformer):
    def between(self, x):
        return x + torch.arange(S, dtype=torch.float32)[None, :, None]


class Gram(Transformer):
    def between(self, x):
        return x + (x @ x.mT) @ x / S


class Causal(Transformer):
    def between(self, x):
        return x + functional.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3, is_causal=True).squeeze(1)


class Written(Transformer):
    def between(self, x):
        x = x.clone()
        x[..., ::2] = x[..., 1::2] * 2
        return x


class WrittenByToken(Transformer):
    def between(self, x):
        x = x.clone()
        x[:, :4] = 0
        return x


class Accumulated(Transformer):
    def between(self, x):
        x = x.clone()
        x += 1
        return x


class Dropping(Transformer):
    def between(self, x):
        return x + functional.dropout(x.contiguous(), 0.5, training=True)  # the mask is drawn in memory order


class Summed(Transformer):
    def between(self, x):
        return x + x.cumsum(dim=1)


@pytest.mark.parametrize(
    ("model", "after"),
    [
        (Shifted, 7),  # back, shift, and in again, twice
        (Summed, 7),
        (Causal, 7),
        (Pooled, 5),  # the mean needs them in no order, but that is not known
        (Positioned, 5),  # a table that both layers make anew
        (Written, 3),
    ],
)
def test_what_mixes_tokens_is_computed_in_raster_order(model: type[Transformer], after: int) -> None:
    assert _both(model().eval(), *_inputs()) == Hoisted(3, 12, after)


def test_products_of_tokens_with_tokens() -> None:
    assert _both(Gram().eval(), *_inputs()).sites == 3


@pytest.mark.parametrize("model", [WrittenByToken, Accumulated])
def test_tensors_that_are_written_to_stop_it(model: type[Transformer]) -> None:
    assert _both(model().eval(), *_inputs()) == Hoisted()


def test_a_view_that_another_memory_layout_forbids_undoes_it(caplog: pytest.LogCaptureFixture) -> None:
    class Viewing(Transformer):
        def forward(self, video, text, table):
            x = self.patches(video).flatten(2).transpose(1, 2)
            table = table.transpose(1, 2).view(2 * CHANNELS, S).unflatten(0, (2, CHANNELS)).transpose(1, 2)
            for block in self.blocks:
                x = block(x + table, text, self.rope.flatten(2, 4), x[:, 0])
            return x

    module = _rewritten(Viewing(), *_inputs()[:2], torch.randn(2, CHANNELS, S).transpose(1, 2))
    before = listing(module)
    with caplog.at_level(logging.DEBUG, logger="sparseattn.fx_passes.hoist_tiling"):
        assert hoist_tiling(module) == Hoisted()
    assert "keep their tiling: " in caplog.text
    assert "view" in caplog.text
    assert listing(module) == before


def test_random_numbers_are_drawn_in_raster_order() -> None:
    assert _both(Dropping().eval(), *_inputs()) == Hoisted(3, 12, 7)


@pytest.mark.parametrize("tile", [(1, 3, 3), (2, 4, 4), (4, 4, 6)])
def test_grids_that_the_tiles_do_not_fill_are_left(tile: tuple[int, int, int]) -> None:
    policy = {"rules": [{"use": "vsa", "kind": "self", "params": {"tile": tile, "sparsity": 0.5}}]}
    module = _rewritten(Transformer().eval(), *_inputs(), policy=policy)
    before = listing(module)
    assert hoist_tiling(module) == Hoisted()
    assert listing(module) == before


def test_sites_of_different_tiles_are_hoisted_apart() -> None:
    other = {"use": "sta", "modules": "blocks.1", "kind": "self", "params": {"tile": [2, 2, 2], "window": [1, 1, 3]}}
    assert _both(Transformer(4).eval(), *_inputs(), policy={"rules": [other, *VSA["rules"]]}).sites > 0


def test_a_gate_is_reordered_with_the_rest() -> None:
    class Gated(Transformer):
        def forward(self, video, text, shift):
            x = self.patches(video).flatten(2).transpose(1, 2)
            for block in self.blocks:
                q, k, v = map(block.heads, block.qkv(x).chunk(3, dim=-1))
                gate = block.heads(block.to_q(x)).sigmoid()
                out, lse = torch.ops.sparseattn.video_sparse_attention(q, k, v, gate=gate, grid=GRID, tile=TILE)
                x = x + out.transpose(1, 2).flatten(2) + lse.mean(dim=1).unsqueeze(-1)
            return x

    model, inputs = Gated().eval(), _inputs()
    changes: list[Hoisted] = []
    with torch.no_grad():
        expected = model(*inputs)
        actual = compiled(model, lambda module: changes.append(hoist_tiling(module)))(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert changes == [Hoisted(3, 15, 2)]


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "tile", "hoisted"), [("wan", (2, 2, 2), Hoisted(2, 8, 4)), ("ltx", (1, 4, 4), Hoisted(2, 8, 3))]
)
def test_models_of_diffusers(name: str, tile: tuple[int, int, int], hoisted: Hoisted) -> None:
    model, inputs = build(next(entry for entry in ZOO if entry.name == name))
    policy = {"rules": [{"use": "vsa", "kind": "self", "params": {"tile": tile, "sparsity": 0.5}}]}
    with torch.no_grad():
        (expected,) = _compiled(model, policy, hoist_tiling=False)(**inputs)
        (actual,) = _compiled(model, policy)(**inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert sparseattn.last_report().hoisted == hoisted
    assert str(hoisted) in str(sparseattn.last_report())


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(Exception, match="hoist_tiling must be true or false"):
        _compiled(Transformer(), hoist_tiling="yes")(*_inputs())
