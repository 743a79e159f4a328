"""Token grids read from graphs: which models show theirs, what is refused, and that a grid never outlives its sizes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from support.zoo import ZOO, build
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import sparseattn
from sparseattn.fx_passes.rewrite import rewrite_graph

DENSE = {"rules": [{"use": "dense"}]}
TILES = {"rules": [{"use": "vsa", "kind": "self", "params": {"tile": [1, 2, 2], "sparsity": 0.0}}]}
GRIDS = {
    "wan": {"2x8x8": 2},
    "cogvideox": {"8 text+2x4x4": 2},
    "hunyuan_video": {"3x8x8+12 text": 2},
    "ltx": {"2x8x8": 2},
    "sd3": {"1x16x16+10 text": 2},
    "vit": {"1 text+1x4x4": 2},
    "flux": {},
    "llama": {},
}


def _zoo(name: str) -> tuple[nn.Module, dict[str, object]]:
    return build(next(entry for entry in ZOO if entry.name == name))


def _grids(report: sparseattn.Report) -> dict[str, int]:
    layouts = [str(row.call.layout) for row in report.rows if row.call.layout is not None]
    return {layout: layouts.count(layout) for layout in layouts}


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, None) for name in GRIDS), ("wan", True), ("hunyuan_video", True), ("ltx", True)]
)
def test_models_show_their_grid(name: str, dynamic: bool | None) -> None:
    model, inputs = _zoo(name)
    with torch.no_grad():
        report = sparseattn.explain(model, policy=DENSE, dynamic=dynamic, **inputs)
    assert _grids(report) == GRIDS[name]
    assert all(row.call.layout is None for row in report.rows if row.call.kind == "cross")


@pytest.mark.models
@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_exported_models_show_their_grid(name: str) -> None:
    model, inputs = _zoo(name)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
    report = rewrite_graph(program.graph_module, sparseattn.Policy.load(DENSE))
    assert _grids(report) == GRIDS[name]


@pytest.mark.models
def test_patches_of_time_made_by_a_linear_layer() -> None:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=1, sample_width=8, sample_height=12, sample_frames=8, patch_size=2, patch_size_t=2,
        temporal_compression_ratio=4, max_text_seq_length=8, use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 4, 12, 8), "encoder_hidden_states": torch.randn(1, 8, 8)}
    rope = (torch.randn(48, 16), torch.randn(48, 16))
    with torch.no_grad():
        more = {"timestep": torch.tensor([1]), "image_rotary_emb": rope}
        report = sparseattn.explain(model, policy=DENSE, **inputs, **more)
    assert _grids(report) == {"8 text+2x6x4": 1}


@pytest.mark.models
def test_a_text_mask_keeps_a_known_grid_dense_and_the_table_says_so() -> None:
    model, inputs = _zoo("hunyuan_video")
    with torch.no_grad():
        report = sparseattn.explain(model, policy=TILES, **inputs)
    assert report.rewritten == 0
    assert "grid=3x8x8+12 text" in str(report)
    assert all("mask" in row.decision.why for row in report.rows)


class Video(nn.Module):
    """A patch embedding and one self-attention over its tokens."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, channels, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(channels, 3 * channels)

    def tokens(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return x + self.attend(x)


def _explained(model: nn.Module, *inputs: Tensor, **options: object) -> sparseattn.Report:
    return sparseattn.explain(model, *inputs, policy=TILES, **options)


def _video(height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(1, 3, 2, height, width)


def test_the_grid_reaches_the_op_and_the_table() -> None:
    report = _explained(Video(), _video())
    assert "grid=2x4x6" in str(report)
    assert report.rows[0].decision.layout == sparseattn.VideoLayout((2, 4, 6))


def test_the_layout_of_a_rule_wins() -> None:
    rule = {**TILES["rules"][0], "layout": [2, 6, 4]}
    report = sparseattn.explain(Video(), _video(), policy={"rules": [rule]})
    assert report.rows[0].decision.layout == sparseattn.VideoLayout((2, 6, 4))
    wrong = {**TILES["rules"][0], "layout": [2, 6, 5]}
    report = sparseattn.explain(Video(), _video(), policy={"rules": [wrong]})
    assert report.rewritten == 0
    assert "layout 2x6x5 makes 60 tokens, the sequence has 48" in report.rows[0].decision.why


def test_sub_graphs_get_the_grid_of_what_they_are_passed() -> None:
    class Checkpointed(Video):
        def forward(self, x):
            x = self.tokens(x)
            for _ in range(2):
                x = x + checkpoint(self.attend, x, use_reentrant=False)
            return x

    assert _grids(_explained(Checkpointed(), _video())) == {"2x4x6": 2}


class Scrambled(Video):
    def tokens(self, x):
        x = super().tokens(x)
        return x[:, torch.randperm(x.shape[1])]


class WidthFirst(Video):
    def tokens(self, x):
        return self.patches(x).permute(0, 2, 4, 3, 1).flatten(1, 3)


class Strided(Video):
    def tokens(self, x):
        return super().tokens(x)[:, ::2]


class Windows(Video):
    def tokens(self, x):
        x = self.patches(x).permute(0, 2, 3, 4, 1)  # (1, 2, 4, 6, C) into windows of 2 x 2 x 3
        x = x.unflatten(3, (2, 3)).unflatten(2, (2, 2)).permute(0, 2, 4, 1, 3, 5, 6)
        return x.flatten(0, 2).flatten(1, 3)


class PerFrame(Video):
    def tokens(self, x):
        return self.patches(x).permute(0, 3, 4, 2, 1).flatten(0, 2)


class Between(Video):
    def tokens(self, x):
        x = super().tokens(x)
        return torch.cat([x[:, :3] * 0, x, x[:, :3]], dim=1)


class Twice(Video):
    def tokens(self, x):
        return torch.cat([super().tokens(x), super().tokens(-x)], dim=1)


class Disagreeing(Video):
    def tokens(self, x):
        mesh = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in (4, 2, 6)), indexing="ij")
        return super().tokens(x) + torch.stack(mesh, dim=-1).flatten(0, 2).sum(-1, keepdim=True)


class Foreign(Video):
    """Keys of something else that happens to be as long."""

    def attend(self, x):
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        k = torch.ones(1, 2, x.shape[1], 8)
        return functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (Scrambled, ""),
        (WidthFirst, ""),
        (Strided, ""),
        (Windows, ""),
        (PerFrame, ""),
        (Foreign, ""),
        (Between, "before and after"),
        (Twice, "more than one grid"),
        (Disagreeing, "2x4x6 and 4x2x6 at once"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_proved_is_left_alone(model: type[Video], note: str) -> None:
    (row,) = _explained(model(), _video()).rows
    assert row.call.layout is None
    assert row.decision.is_dense
    assert "the token grid is not known" in row.decision.why
    assert note in row.decision.why


def test_tokens_that_a_convolution_adds_keep_the_grid() -> None:
    class Mixed(Video):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv3d(16, 16, 3, padding=1)

        def tokens(self, x):
            x = self.patches(x)
            return functional.group_norm(x + self.mix(x), 4).flatten(2).mT.contiguous()

    assert _grids(_explained(Mixed(), _video())) == {"2x4x6": 1}


@pytest.mark.parametrize("dynamic", [None, True])
def test_another_grid_of_as_many_tokens_compiles_again(dynamic: bool | None) -> None:
    model, grids = Video(), []
    options = {"policy": TILES, "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", options=options, dynamic=dynamic, fullgraph=True)
    sizes = ((8, 12), (12, 8), (16, 6), (12, 8), (8, 12))
    compilations = []
    with torch.no_grad():
        for height, width in sizes:
            x = _video(height, width)
            torch._dynamo.utils.counters.clear()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
            compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            grids.append(str(sparseattn.last_report().rows[0].decision.layout))
    assert grids[:3] == ["2x4x6", "2x6x4", "2x8x3"]
    assert compilations == [1, 1, 1, 0, 0]


def test_a_policy_that_needs_no_grid_does_not_compile_again() -> None:
    model = Video()
    options = {"policy": "exact", "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", options=options, dynamic=True, fullgraph=True)
    with torch.no_grad():
        compiled(_video(8, 12))
        torch._dynamo.utils.counters.clear()
        compiled(_video(12, 8))
        compiled(_video(16, 6))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_a_length_given_by_a_rule_is_guarded_too() -> None:
    rule = {**TILES["rules"][0], "layout": [2, 4, 6]}
    model = Video()
    options = {"policy": {"rules": [rule]}, "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", options=options, dynamic=True, fullgraph=True)
    with torch.no_grad():
        compiled(_video(8, 12))
        assert sparseattn.last_report().rewritten == 1
        x = _video(8, 16)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert "makes 48 tokens, the sequence has 64" in sparseattn.last_report().rows[0].decision.why


def test_a_symbolic_grid_of_an_exported_program_is_refused() -> None:
    height = torch.export.Dim("half_height", min=2, max=64)
    program = torch.export.export(Video(), (_video(),), dynamic_shapes=({3: 2 * height},))
    (row,) = rewrite_graph(program.graph_module, sparseattn.Policy.load(TILES)).rows
    assert row.decision.is_dense
    assert "symbolic" in row.decision.why


@pytest.mark.models
@pytest.mark.parametrize(("name", "grid", "chosen"), [("wan", "21x30x52", "sta"), ("hunyuan_video", "33x45x80", None)])
def test_full_size_models_are_explained_on_the_meta_device(
    name: str, grid: str, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    benchmark = importlib.import_module("suites.cpu.explain_full_size")
    report = benchmark.explain(benchmark.MODELS[name], 1, "sm90")
    rows = [row for row in report.rows if row.call.layout is not None]
    assert rows
    assert {"x".join(map(str, row.call.layout.grid)) for row in rows} == {grid}
    assert {row.decision.backend for row in rows} == {chosen}
