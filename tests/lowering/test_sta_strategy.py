"""StaStrategy: upstream's files, its choice of windows, and the rules that give every head its window."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention_model import Blocks, tokens
from support.graphs import fresh_dynamo  # noqa: F401  (a fixture)
from torch import Tensor

import sparseattn
from sparseattn import Policy, Schedule, StaStrategy, VideoLayout
from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.attn_ops.step_range import Step
from sparseattn.lowering.decide import decide
from sparseattn.lowering.sta_search import as_candidate

HUNYUAN = {(5, 6, 10): 21600, (5, 3, 3): 20400, (1, 6, 10): 15888, (3, 3, 5): 7416, (5, 1, 10): 5256, (5, 6, 1): 1440}
WAN = ["3, 1, 10", "1, 5, 7", "3, 3, 3", "1, 6, 5", "1, 3, 10", "3, 6, 1"]
FULL = (3, 6, 10)
GRID = (18, 48, 80)


def published() -> StaStrategy:
    """As many heads with each window as in Hunyuan's strategy: 15 full steps, the other windows in no order."""
    full, *rest = HUNYUAN
    others = [window for window in rest for _ in range(HUNYUAN[window])]
    random.Random(0).shuffle(others)
    windows = iter([full] * HUNYUAN[full] + others)
    return StaStrategy([[[next(windows) for _ in range(24)] for _ in range(60)] for _ in range(50)])


def small(steps: int = 4, layers: int = 2, heads: int = 2) -> StaStrategy:
    """Another window at every place but those of the first step, which are full."""
    windows = itertools.cycle([(3, 1, 10), (1, 3, 3), (3, 6, 1), (1, 6, 10), (1, 1, 5)])
    sparse = [[[next(windows) for _ in range(heads)] for _ in range(layers)] for _ in range(steps - 1)]
    return StaStrategy([[[FULL] * heads] * layers, *sparse])


def some_losses(seed: int, steps: int = 5, layers: int = 3, heads: int = 4) -> dict[str, Any]:
    """Losses in few values, so that there are ties."""
    draw = random.Random(seed)
    return {
        str(list(as_candidate(name))): [
            [[draw.randrange(8) / 8 for _ in range(heads)] for _ in range(layers)] for _ in range(steps)
        ]
        for name in WAN
    }


def test_the_published_strategy() -> None:
    strategy = published()
    assert strategy.shape == (50, 60, 24)
    assert strategy.full == (5, 6, 10)
    assert strategy.sparsity == pytest.approx(0.58375, abs=1e-12)
    assert [round(100 * share, 1) for share in strategy.shares.values()] == [30.0, 28.3, 22.1, 10.3, 7.3, 2.0]
    assert str(strategy).startswith("50 steps x 60 layers x 24 heads, sparsity 58.38%: 5x6x10 30.0%, 5x3x3 28.3%")


def test_a_file_is_read_and_written_back_byte_for_byte(tmp_path: Path) -> None:
    shape, windows = (50, 60, 24), itertools.cycle(map(list, HUNYUAN))
    places = itertools.product(*map(range, shape))
    text = json.dumps({f"{t}_{layer}_{h}": next(windows) for t, layer, h in places}, indent=4)  # as upstream writes it
    (tmp_path / "mask_strategy_s15.json").write_text(text, encoding="utf-8")
    strategy = StaStrategy.load(tmp_path / "mask_strategy_s15.json")
    strategy.save(tmp_path / "again.json")
    assert strategy.shape == shape
    assert (tmp_path / "again.json").read_bytes() == text.encode()


def test_keys_may_come_in_any_order_and_full_may_be_given() -> None:
    table = small().to_dict()
    strategy = StaStrategy.parse(dict(reversed(table.items())), full=(4, 6, 10))
    assert strategy.to_dict() == table
    assert strategy.full == (4, 6, 10)
    assert strategy != StaStrategy.parse(table)
    assert hash(StaStrategy.parse(table)) == hash(small())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"1_0_x": [1, 1, 1]}, r"unknown key '1_0_x'\. A key is \"step_layer_head\", such as \"15_0_3\""),
        ({"01_0_0": [1, 1, 1]}, "unknown key '01_0_0'"),
        ({"L2_loss": {}}, "unknown key 'L2_loss'"),
        ({"5_0_0": [1, 1, 1]}, "no window at 4_0_0, and there are 6 steps, 2 layers and 2 heads"),
        ({"1_0_0": "3, 1, 10"}, r"1_0_0: a window must be a list of three positive ints \[t, h, w\], got '3, 1, 10'"),
        ({"1_0_0": [3, 1]}, r"1_0_0: a window must be a list of three"),
        ({"1_0_0": [3, 0, 1]}, r"1_0_0: a window must be a list of three positive ints"),
        ({"1_0_0": [3, 1.0, 1]}, r"1_0_0: a window must be a list of three positive ints"),
    ],
)
def test_mistakes_in_a_file_are_named(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "mask_strategy_x.json"
    path.write_text(json.dumps(small().to_dict() | change), encoding="utf-8")
    with pytest.raises(PolicyError, match=rf"mask_strategy_x\.json: {says}"):
        StaStrategy.load(path)


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"list\.json: must be a table"):
        StaStrategy.load(tmp_path / "list.json")
    with pytest.raises(PolicyError, match=r"a strategy is a \.json file, got '\.toml'"):
        StaStrategy.load("strategy.toml")
    with pytest.raises(PolicyError, match=r"missing\.json: cannot be read"):
        StaStrategy.load(tmp_path / "missing.json")
    with pytest.raises(PolicyError, match=r"windows\[1\]\[0\] must have 1 heads, got 2"):
        StaStrategy([[[FULL]], [[FULL, FULL]]])
    with pytest.raises(PolicyError, match=r"windows\[1\] must have 1 layers as windows\[0\] has, got 2"):
        StaStrategy([[[FULL]], [[FULL], [FULL]]])
    with pytest.raises(PolicyError, match=r"windows\[0\]\[0\]: must be a list, nested as"):
        StaStrategy([[[]]])
    with pytest.raises(
        PolicyError, match=r"full must hold every window, got \[1, 6, 10\] and windows up to \[3, 6, 10\]"
    ):
        StaStrategy([[[FULL]]], full=(1, 6, 10))


def upstream(tables: list[dict[str, Any]], skip: int) -> dict[str, list[int]]:
    """Upstream's selection, place by place: the first of the least mean losses, full in the first steps."""
    steps, layers, heads = 5, 3, 4
    chosen = {}
    for t, layer, h in itertools.product(range(steps), range(layers), range(heads)):
        losses = [sum(table[name][t][layer][h] for table in tables) / len(tables) for name in tables[0]]
        best = json.loads(list(tables[0])[losses.index(min(losses))])
        chosen[f"{t}_{layer}_{h}"] = list(FULL) if t < skip else best
    return chosen


@pytest.mark.parametrize("skip", [0, 2, 5, 12])
def test_the_search_is_upstreams(skip: int) -> None:
    positive, negative = some_losses(1), some_losses(2)
    strategy = StaStrategy.search([positive, negative], full=FULL, skip_time_steps=skip, candidates=WAN)
    assert strategy.to_dict() == upstream([positive, negative], skip)
    assert strategy.full == FULL


def test_a_search_reads_upstreams_files(tmp_path: Path) -> None:
    tables = [some_losses(seed) for seed in range(3)]
    for number, table in enumerate(tables):
        folder = tmp_path / ("positive" if number < 2 else "negative")
        folder.mkdir(exist_ok=True)
        text = json.dumps({"L2_loss": table, "L1_loss": some_losses(9)})
        (folder / f"mask_search_{number}.json").write_text(text, encoding="utf-8")
    (tmp_path / "positive" / "notes.json").write_text("no losses", encoding="utf-8")
    given = [str(tmp_path / "positive"), tmp_path / "negative"]
    strategy = StaStrategy.search(given, full="3, 6, 10", skip_time_steps=1)
    assert strategy.to_dict() == upstream(tables, 1)
    by_l1 = StaStrategy.search(given[:1], full=FULL, skip_time_steps=1, loss="L1_loss")
    assert by_l1.to_dict() == upstream([some_losses(9)], 1)


def test_full_is_no_candidate_and_losses_may_be_arrays() -> None:
    losses = {(1, 3, 3): torch.ones(1, 1, 2), FULL: torch.zeros(1, 1, 2)}
    assert StaStrategy.search(losses, full=FULL, skip_time_steps=0).windows == ((((1, 3, 3),) * 2,),)


def chosen(losses: dict[Any, float], **choices: Any) -> Any:
    """The window of one place."""
    table = {window: [[[loss]]] for window, loss in losses.items()}
    return StaStrategy.search(table, full=FULL, skip_time_steps=0, **choices).windows[0][0][0]


def test_a_budget_leaves_a_head_full_where_nothing_is_within_it() -> None:
    losses = {(1, 3, 3): 0.5, (3, 6, 1): 0.25}
    assert chosen(losses) == (3, 6, 1)
    assert chosen(losses, budget=0.25) == (3, 6, 1)
    assert chosen(losses, budget=0.2) == FULL


def test_a_weight_buys_sparsity_within_the_budget() -> None:
    losses = {(1, 6, 10): 0.25, (1, 3, 3): 0.3, (1, 1, 1): 0.9}  # densities 1/3, 1/20, 1/180
    assert chosen(losses) == (1, 6, 10)
    assert chosen(losses, sparsity_weight=0.17) == (1, 6, 10)
    assert chosen(losses, sparsity_weight=0.18) == (1, 3, 3)  # 0.05 = 0.17647 * (1/3 - 1/20)
    assert chosen(losses, sparsity_weight=100.0) == (1, 1, 1)
    assert chosen(losses, sparsity_weight=100.0, budget=0.5) == (1, 3, 3)


@pytest.mark.parametrize(
    ("losses", "choices", "says"),
    [
        ({"3, x": [[[1.0]]]}, {}, "candidate: must be three positive ints, got '3, x'"),
        ({"3, 1": [[[1.0]]]}, {}, r"candidate '3, 1': a window must be a list of three positive ints"),
        ({"3, 1, 0": [[[1.0]]]}, {}, r"candidate '3, 1, 0': a window must be a list of three positive ints"),
        ({(3, 1, 1): [[1.0]]}, {}, r"losses of \[3, 1, 1\] in table 1 must be \[step\]\[layer\]\[head\]"),
        ({(3, 1, 1): [[[1.0], [1.0, 2.0]]]}, {}, r"losses of \[3, 1, 1\] in table 1 must be numbers"),
        ({(3, 1, 1): [[["a"]]]}, {}, "must be numbers"),
        ({(3, 1, 1): [[[-1.0]]]}, {}, "must be finite and at least 0"),
        ({(3, 1, 1): [[[math.nan]]]}, {}, "must be finite and at least 0"),
        ({(3, 1, 1): [[[1.0]]], (1, 1, 1): [[[1.0, 2.0]]]}, {}, "of one size everywhere"),
        ({FULL: [[[1.0]]]}, {}, "candidates must hold a window besides the full one"),
        ({(3, 1, 1): [[[1.0]]]}, {"candidates": ["1, 1, 1"]}, r"table 1 of losses has no candidate \[1, 1, 1\]"),
        ({(3, 1, 1): [[[1.0]]]}, {"skip_time_steps": -1}, "skip_time_steps must be an int of at least 0"),
        ({(3, 1, 1): [[[1.0]]]}, {"budget": -0.1}, "budget must be a number of at least 0"),
        ({(3, 1, 1): [[[1.0]]]}, {"sparsity_weight": math.inf}, "sparsity_weight must be finite"),
        ({"L1_loss": {"3, 1, 1": [[[1.0]]]}}, {}, r"no L2_loss\. It has L1_loss"),
        ([], {}, "losses must hold a table, a file or a folder, got an empty list"),
        ([3], {}, "losses must be a table of candidates, got int"),
    ],
)
def test_mistakes_in_a_search_are_named(losses: Any, choices: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        StaStrategy.search(losses, full=FULL, **choices)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r'must hold \*\.json files with "mask" in their names, and has none'):
        StaStrategy.search(tmp_path, full=FULL)


def call(heads: int = 2, grid: tuple[int, int, int] = GRID) -> AttentionCall:
    length = math.prod(grid)
    return AttentionCall(1, heads, heads, length, length, 64, layout=VideoLayout(grid))


def test_every_place_gets_its_windows() -> None:
    strategy, cpu = small(), Capability.of("cpu")
    policy = Policy.load(Policy(strategy.rules("blocks.{}.attn1", layout=GRID)).to_dict())
    steps, layers, _ = strategy.shape
    for index, layer in itertools.product(range(steps), range(layers)):
        step = Step(index, steps)
        decision = decide(call(), cpu, policy, module=f"blocks.{layer}.attn1", step=step)
        if index == 0:
            assert decision.is_dense
        else:
            window = dict(decision.params)["window"]
            assert isinstance(window, Schedule)
            assert window.at(step, "window") == tuple(itertools.chain(*strategy.windows[index][layer]))
    for module, step_ in (("blocks.2.attn1", Step(1, 4)), ("blocks.0.attn1", None)):
        assert decide(call(), cpu, policy, module=module, step=step_).rule is None


def test_the_published_strategy_as_rules() -> None:
    blocks = [f"double.{n}.attn" for n in range(20)] + [f"single.{n}.attn" for n in range(40)]
    strategy = published()
    first, *rest = strategy.rules(blocks, layout={"grid": (30, 48, 80), "text_tokens": 256}, mode="require")
    assert (first.use, first.steps, first.modules, first.mode) == (("dense",), ":15", tuple(blocks), "prefer")
    assert [rule.modules for rule in rest] == [(block,) for block in blocks]
    assert {(rule.use, rule.steps, rule.mode) for rule in rest} == {(("sta",), "15:", "require")}
    for layer, rule in enumerate(rest):
        window = dict(rule.params)["window"]
        assert isinstance(window, Schedule)
        given = [tuple(itertools.chain(*layers[layer])) for layers in strategy.windows]
        assert list(window.values) == given


def test_layers_alike_share_a_rule_and_windows_that_stay_need_no_steps() -> None:
    alike, params = [(1, 3, 3), FULL], {"tile": [3, 3, 4]}
    rules = StaStrategy([[alike, [FULL, FULL], alike]] * 9).rules("b.{}", where_full="sage, flash", params=params)
    assert [(rule.use, rule.modules, rule.steps) for rule in rules] == [
        (("sta",), ("b.0", "b.2"), None),
        (("sage", "flash"), ("b.1",), None),
    ]
    assert dict(rules[0].params) == {"tile": (3, 3, 4), "window": (1, 3, 3, *FULL)}
    (rule,) = StaStrategy([[[FULL]]] * 3).rules("b.{}")
    assert (rule.use, rule.steps) == (("dense",), None)


def test_a_model_with_other_heads_stays_dense_with_the_reason() -> None:
    policy = Policy(small().rules("{}", layout=GRID))
    decision = decide(call(heads=3), Capability.of("cpu"), policy, module="0", step=Step(1, 4))
    assert decision.is_dense
    assert "window is given for 2 heads, the call has 3" in decision.why


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"modules": "blocks.*"}, r"modules must have \{\} for the number of the layer"),
        (
            {"modules": ["a"]},
            "modules must have one glob for each of the strategy's 2 layers, got 1, 1 of them different",
        ),
        ({"modules": ["a", "a"]}, "got 2, 1 of them different"),
        ({"params": {"window": [1, 1, 1]}}, "params: the windows are those of the strategy. Remove window"),
        (
            {"layout": (30, 48, 80)},
            r"30x48x80 has \(5, 6, 10\) tiles of \(6, 8, 8\), and the strategy is for \(3, 6, 10\)",
        ),
        ({"layout": GRID, "params": {"tile": [6, 8, 4]}}, r"has \(3, 6, 20\) tiles of \(6, 8, 4\)"),
        ({"params": {"tille": [6, 8, 4]}}, "sta has no parameter 'tille'"),
    ],
)
def test_mistakes_in_rules_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        small().rules(**{"modules": "blocks.{}", **given})


def by_the_op(model: Blocks, x: Tensor, layers: Any) -> Tensor:
    """The model with sliding tiles of these windows in the place of its attention."""
    for block, heads in zip(model.blocks, layers, strict=True):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1))
        given = {"grid": [4, 4, 6], "tile": [2, 2, 2], "window": list(itertools.chain(*heads))}
        out, _ = sparseattn.ops.sliding_tile_attention(q, k, v, **given)
        x = x + out.transpose(1, 2).flatten(2)
    return x


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_compiled_model_follows_the_strategy_in_two_graphs(inner: str) -> None:
    full, model, x = (2, 2, 3), Blocks(), tokens(1, 96)
    draw = random.Random(0)
    kinds = list(itertools.product((1, 2), (1, 2), (1, 3)))
    sparse = [[[draw.choice(kinds) for _ in range(2)] for _ in range(2)] for _ in range(10)]
    strategy = StaStrategy([[[full] * 2] * 2, *sparse])
    rules = strategy.rules("blocks.{}", layout=(4, 4, 6), params={"tile": [2, 2, 2]}, mode="require")
    options = {"policy": Policy(rules), "inner_backend": inner}
    compiled = torch.compile(model, backend="sparseattn", fullgraph=True, options=options)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    with torch.no_grad():
        for step in sparseattn.steps(range(11)):
            torch.testing.assert_close(compiled(x), by_the_op(model, x, strategy.windows[step]), rtol=1e-4, atol=1e-5)
        with sparseattn.steps(11, 12), pytest.raises(PolicyError, match="the table ends after 11 steps"):
            compiled(x)
    assert counters["unique_graphs"] == 2
