"""sta_losses: the differences of every window, step, layer and head; what comes of them; clear refusals."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, tokens
from support.zoo import ZOO, build
from torch import Tensor, nn
from torch.nn import functional

import sparseattn
from sparseattn import Policy, Sample, StaLosses, StaStrategy
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.fx_passes import sta_probe

GRID, TILE, FULL = (4, 4, 6), (2, 2, 2), (2, 2, 3)
WINDOWS = ["1, 1, 1", "1, 2, 3", "2, 2, 1", "1, 1, 3"]
HEADS = 2


def measured(model: Any, samples: Any, **options: Any) -> StaLosses:
    given = {"windows": WINDOWS, "layout": GRID, "params": {"tile": TILE}, "progress": False, **options}
    return sparseattn.sta_losses(model, samples, **given)


def at_steps(steps: int, each: int = 1) -> list[Sample]:
    """So many samples for each step, in no order."""
    found = [Sample((tokens(1, 96),), step=step) for step in range(steps) for _ in range(each)]
    random.Random(0).shuffle(found)
    return found


def layers_of(model: Blocks, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of every layer of the dense model."""
    found = []
    for block in model.blocks:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1))
        found.append((q, k, v))
        x = x + block(x)
    return found


def differences(q: Tensor, k: Tensor, v: Tensor, window: list[int]) -> Tensor:
    """(B, H, S, D), ours - dense, fp64."""
    ours, _ = sparseattn.ops.sliding_tile_attention(q, k, v, grid=GRID, tile=TILE, window=window)
    return ours.double() - functional.scaled_dot_product_attention(q, k, v).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_mean_differences_of_every_step_layer_and_head(dtype: torch.dtype) -> None:
    model = Blocks().to(dtype)
    samples = [Sample((call.args[0].to(dtype),), step=call.step) for call in at_steps(3, each=2)]
    losses = measured(model, samples, total_steps=3)
    assert (losses.modules, losses.full) == (("blocks.0", "blocks.1"), FULL)
    assert list(losses) == ["L2_loss", "L1_loss"]
    for step in range(3):
        with torch.no_grad():
            qkvs = [layers_of(model, call.args[0]) for call in samples if call.step == step]
        for layer, name in itertools.product(range(2), losses["L2_loss"]):
            apart = torch.cat([differences(*layers[layer], json.loads(name)) for layers in qkvs])
            squared, absolute = apart.square().mean(dim=(0, 2, 3)), apart.abs().mean(dim=(0, 2, 3))
            assert losses["L2_loss"][name][step][layer] == pytest.approx(squared.tolist(), rel=1e-4)
            assert losses["L1_loss"][name][step][layer] == pytest.approx(absolute.tolist(), rel=1e-4)


def test_the_window_of_all_tiles_loses_nothing() -> None:
    losses = measured(Blocks(), [(tokens(1, 96),)], windows=[FULL, "1, 1, 1"])
    assert max(itertools.chain(*losses["L1_loss"]["[2, 2, 3]"][0])) < 1e-6
    assert min(itertools.chain(*losses["L1_loss"]["[1, 1, 1]"][0])) > 1e-3


def test_passes_of_guidance_average_as_their_tables_do(tmp_path: Path) -> None:
    model, positive, negative = Blocks(), at_steps(2), at_steps(2)
    together = measured(model, positive + negative, total_steps=2)
    for name, samples in (("positive", positive), ("negative", negative)):
        measured(model, samples, total_steps=2).save(tmp_path / f"mask_search_{name}.json")
    chosen = {"full": together.full, "skip_time_steps": 0, "sparsity_weight": 0.02}
    assert StaStrategy.search(together, **chosen) == StaStrategy.search(tmp_path, **chosen)


def test_a_file_has_upstreams_form(tmp_path: Path) -> None:
    losses = measured(Blocks(), at_steps(2), total_steps=2)
    losses.save(tmp_path / "mask_search_0.json")
    table = json.loads((tmp_path / "mask_search_0.json").read_text(encoding="utf-8"))
    assert list(table) == ["L2_loss", "L1_loss"]
    assert list(table["L2_loss"]) == ["[1, 1, 1]", "[1, 2, 3]", "[2, 2, 1]", "[1, 1, 3]"]
    assert [len(table["L2_loss"]["[1, 1, 1]"]), *map(len, table["L2_loss"]["[1, 1, 1]"])] == [2, 2, 2]
    assert table == dict(losses)
    with pytest.raises(PolicyError, match=r"a strategy is a \.json file"):
        losses.save(tmp_path / "mask_search.toml")


def test_memory_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    class Counted(sta_probe.WindowLosses):
        def backend(self, gm: Any, inputs: Any) -> Any:
            run = super().backend(gm, inputs)

            def counting(*given: Any) -> Any:
                out = run(*given)
                kept.append(sum(sums.losses.numel() for sums in self.sums.values()))
                return out

            return counting

    monkeypatch.setattr("sparseattn.fx_passes.sta_losses.WindowLosses", Counted)
    measured(Blocks(), [(tokens(1, 96),) for _ in range(4)])
    assert kept == [2 * 2 * len(WINDOWS) * HEADS] * 4  # two losses of two layers


@pytest.mark.models
def test_the_layout_is_read_from_the_graph() -> None:
    model, inputs = build(next(entry for entry in ZOO if entry.name == "wan"))
    losses = measured(model, [inputs], windows=["1, 1, 1", "1, 3, 3"], layout=None, params={"tile": [1, 2, 2]})
    assert (losses.modules, losses.full) == (("blocks.0.attn1", "blocks.1.attn1"), (2, 4, 4))
    small, large = (torch.tensor(losses["L2_loss"][name]) for name in ("[1, 1, 1]", "[1, 3, 3]"))
    assert (large < small).all()
    strategy = StaStrategy.search(losses, full=losses.full, skip_time_steps=0)
    policy = Policy(strategy.rules(losses.modules, params={"tile": [1, 2, 2]}, mode="require"))
    with torch.no_grad():
        assert sparseattn.explain(model, policy=policy, **inputs).chosen["sta"] == 2


@pytest.mark.parametrize(("skip", "graphs"), [(0, 1), (1, 2)])
def test_from_losses_to_a_compiled_model(skip: int, graphs: int) -> None:
    model, samples = Blocks(), at_steps(3, each=2)
    losses = measured(model, samples, total_steps=3)
    every = torch.tensor([losses["L2_loss"][str([int(n) for n in name.split(",")])] for name in WINDOWS])
    budget = every.min(dim=0).values.median().item()  # half of the heads have a window within it
    strategy = StaStrategy.search(losses, full=losses.full, skip_time_steps=skip, budget=budget, sparsity_weight=0.01)
    assert losses.full in strategy.shares
    assert len(strategy.shares) > 1
    rules = strategy.rules(losses.modules, layout=GRID, params={"tile": TILE}, mode="require")
    options = {"policy": Policy(rules), "inner_backend": "aot_eager"}
    compiled = torch.compile(model, backend="sparseattn", fullgraph=True, options=options)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    with torch.no_grad():
        for step in sparseattn.steps(range(3)):
            x = tokens(1, 96)
            torch.testing.assert_close(compiled(x), by_the_op(model, x, strategy.windows[step]), rtol=1e-4, atol=1e-5)
    assert counters["unique_graphs"] == graphs


def by_the_op(model: Blocks, x: Tensor, layers: Any) -> Tensor:
    """The model with sliding tiles of these windows in the place of its attention."""
    for block, heads in zip(model.blocks, layers, strict=True):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1))
        given = {"grid": GRID, "tile": TILE, "window": list(itertools.chain(*heads))}
        out, _ = sparseattn.ops.sliding_tile_attention(q, k, v, **given)
        x = x + out.transpose(1, 2).flatten(2)
    return x


class Mixed(nn.Module):
    """Two layers, of two and of four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.four = Blocks(1), Blocks(1, heads=4, head_dim=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.four(self.two(x))


def bare(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return functional.scaled_dot_product_attention(q, q, q)


class SometimesOne(Blocks):
    """Leaves its second layer out where the first token says so."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        return x if x.shape[0] == 2 else x + self.blocks[1](x)


X = torch.randn(1, 96, 32)


@pytest.mark.parametrize(
    ("model", "samples", "options", "says"),
    [
        (Blocks(), [], {}, r"no samples\. Give at least one tuple"),
        (Blocks(), [3], {}, "a sample is a tuple of arguments"),
        (Blocks(), [Sample((X,), step=0)], {}, "where samples name a step, all must, and total_steps says how many"),
        (Blocks(), [Sample((X,), step=0), (X,)], {"total_steps": 1}, "where samples name a step, all must"),
        (Blocks(), [(X,)], {"total_steps": 1}, "where samples name a step, all must"),
        (Blocks(), [Sample((X,), step=0)], {"total_steps": 0}, "total_steps must be an int of at least 1, got 0"),
        (Blocks(), [Sample((X,), step=5)], {"total_steps": 3}, r"step 5 is not in 0 \.\.\. 2"),
        (Blocks(), [Sample((X,), step=0)], {"total_steps": 2}, "no sample has step 1. Every step needs one"),
        (Blocks(), [(X,)], {"windows": []}, "windows must be a list of some"),
        (Blocks(), [(X,)], {"windows": "1, 1, 1"}, "windows must be a list of some"),
        (Blocks(), [(X,)], {"windows": ["1, 1"]}, "a window must be a list of three positive ints"),
        (Blocks(), [(X,)], {"windows": ["3, 1, 1"]}, r"must be within the \[2, 2, 3\] tiles, got \[3, 1, 1\]"),
        (Blocks(), [(X,)], {"params": {"window": [1, 1, 1]}}, r"params must not have a window\. Give windows"),
        (Blocks(), [(X,)], {"params": {"tille": [2, 2, 2]}}, "sta has no parameter 'tille'"),
        (Blocks(), [(X,)], {"layout": None}, r"can be measured\.\n  blocks\.0: .*layout"),
        (Blocks(), [(X,)], {"layout": (4, 4, 5)}, r"can be measured\.\n  blocks\.0: .*96"),
        (Blocks(), [(X,)], {"modules": "layers.*"}, r"can be measured\.\n  blocks\.0: .*is not layers"),
        (Blocks(is_causal=True), [(X,)], {}, r"can be measured\.\n  blocks\.0: .*causal"),
        (nn.Linear(32, 32), [(X,)], {}, "no attention of this model can be measured"),
        (bare, [(X,)], {}, "no module owns it, so that no rule could name it"),
        (Mixed(), [(X,)], {}, "as many heads, got 2 at two.blocks.0, 4 at four.blocks.0. Choose by modules"),
        (
            SometimesOne(),
            [(X,), (X.expand(2, -1, -1),)],
            {},
            "sample 1 did not measure the layers of the first: blocks.1",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(model: Any, samples: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        measured(model, samples, **options)


class Patches(nn.Module):
    """Patches of a video and text, and attention among them: the graph shows the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.blocks = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2)), Blocks(1)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        return self.blocks(torch.cat([self.cut(video).flatten(2).transpose(1, 2), text], dim=1))


def test_videos_of_several_sizes_are_refused_and_of_one_are_not() -> None:
    options = {"layout": None, "windows": ["1, 1, 1"]}
    long, short, text = torch.randn(1, 3, 4, 8, 12), torch.randn(1, 3, 2, 8, 12), torch.randn(1, 4, 32)
    assert measured(Patches(), [(long, text), (long, text)], **options).full == FULL
    with pytest.raises(PolicyError, match=r"one number of tiles, got \(2, 2, 3\) at blocks.blocks.0, \(1, 2, 3\) at"):
        measured(Patches(), [(long, text), (short, text)], **options)


def test_prompts_of_more_lengths_than_dynamo_compiles_graphs() -> None:
    count = torch._dynamo.config.recompile_limit + 2
    samples = [(torch.randn(1, 3, 4, 8, 12), torch.randn(1, 1 + length, 32)) for length in range(count)]
    losses = measured(Patches(), samples, layout=None, windows=["1, 1, 1"])
    assert (losses.modules, losses.full) == (("blocks.blocks.0",), FULL)
