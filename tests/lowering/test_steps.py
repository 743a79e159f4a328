"""Steps: the cursor, ranges of steps, and schedules that follow them."""

from __future__ import annotations

import ast
import math
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from sparseattn import Policy, Rule, Schedule, step_callback, steps
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.attn_ops.registry import backend
from sparseattn.attn_ops.step_range import Step, StepRange
from sparseattn.lowering.steps import current_step


def covered(text: str, total: int) -> list[int]:
    return [index for index in range(total) if Step(index, total) in StepRange.parse(text)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (":", range(10)),
        ("3:", range(3, 10)),
        (":4", range(4)),
        ("3:-3", range(3, 7)),
        ("-2:", range(8, 10)),
        ("7", [7]),
        ("-1", [9]),
        ("0.2:0.8", range(2, 8)),
        ("0.25:", range(3, 10)),
        (" 1 : 2 ", [1]),
        ("12:", []),
    ],
)
def test_ranges_are_slices(text: str, wanted: Any) -> None:
    assert covered(text, 10) == list(wanted)
    assert covered(str(StepRange.parse(text)), 10) == list(wanted)


@pytest.mark.parametrize("text", ["", "a:", "1:2:3", "5:3", "-1:-1", "1.5:", "0.5", "0.3:0.2", "3:3", "--1:"])
def test_wrong_ranges_are_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="Write for example steps ="):
        StepRange.parse(text)


def test_a_range_that_needs_the_number_of_steps_says_so() -> None:
    assert Step(5) in StepRange.parse("3:9")
    for text in (":-3", "0.2:"):
        with pytest.raises(PolicyError, match=r"their number is not set. Write sparseattn.steps\(i, n\)"):
            assert Step(5) in StepRange.parse(text)


def test_a_loop_sets_the_step_in_its_body_only() -> None:
    seen = [(item, current_step()) for item in steps("abc")]
    assert seen == [("a", Step(0, 3)), ("b", Step(1, 3)), ("c", Step(2, 3))]
    assert current_step() is None
    for _ in steps(iter("abc")):
        break
    assert current_step() is None
    assert len(steps(iter("abc"), 3)) == 3


def test_blocks_nest_and_end_with_an_error() -> None:
    with steps(1, 4):
        with steps(2):
            assert current_step() == Step(2)
        with pytest.raises(ZeroDivisionError), steps(3):
            1 / 0  # noqa: B018
        assert current_step() == Step(1, 4)
    assert current_step() is None


def test_another_thread_has_its_own_step() -> None:
    seen = []
    with steps(1, 4):
        thread = threading.Thread(target=lambda: seen.append(current_step()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("arguments", [(-1,), (4, 4), (0, 0), (True,), (None,), (0, 2.0)])
def test_wrong_steps_are_refused(arguments: Any) -> None:
    with pytest.raises(PolicyError, match=r"^steps: "):
        steps(*arguments)


def test_more_items_than_the_total_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"must be 0 ... 1, as there are 2, got 2"):
        list(steps("abc", 2))


def test_the_callback_of_a_pipeline() -> None:
    """As a diffusers pipeline calls it: after every step."""
    seen, callback = [], step_callback(3)
    for index in range(3):
        seen.append(current_step())
        assert callback(None, index, None, {"latents": index}) == {"latents": index}
    assert seen == [Step(0, 3), Step(1, 3), Step(2, 3)]
    assert current_step() is None
    with pytest.raises(PolicyError, match="step_callback: total"):
        step_callback(0)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (Schedule(kind="table", values=(0.9, 0.5, 0.1, 0.2, 0.3)), [0.9, 0.5, 0.1, 0.2, 0.3]),
        (Schedule(kind="linear", start=1.0, end=0.2), [1.0, 0.8, 0.6, 0.4, 0.2]),
        (Schedule(kind="linear", start=1.0, end=0.2, steps="1:4"), [1.0, 1.0, 0.6, 0.2, 0.2]),
        (Schedule(kind="linear", start=1.0, end=0.2, steps="0.5:"), [1.0, 1.0, 1.0, 1.0, 0.2]),
        (Schedule(kind="cosine", start=1.0, end=0.0), [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]),
        (Schedule(kind="staircase", start=0.0, end=0.7, by=0.3, every=2), [0.0, 0.0, 0.3, 0.3, 0.6]),
        (Schedule(kind="staircase", start=1.0, end=0.5, by=0.3), [1.0, 0.7, 0.5, 0.5, 0.5]),
    ],
)
def test_values_of_schedules(schedule: Schedule, wanted: list[float]) -> None:
    values = [schedule.at(Step(index, 5), "keep_ratio") for index in range(5)]
    assert values == pytest.approx(wanted)
    assert Schedule.parse(schedule.to_dict()) == schedule


def test_the_staircase_is_that_of_vsa() -> None:
    """min(step // interval, target // rate) * rate, where target is a multiple of the rate."""
    schedule = Schedule(kind="staircase", start=0.0, end=0.9, by=0.03, every=50)
    for step in (0, 49, 50, 149, 1499, 1500, 9999):
        assert schedule.at(Step(step), "sparsity") == pytest.approx(min(step // 50, round(0.9 / 0.03)) * 0.03)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({}, "kind is missing"),
        ({"kind": "liner"}, 'Did you mean "linear"'),
        ({"kind": "linear", "start": 1.0}, "a linear needs end"),
        ({"kind": "linear", "start": 1.0, "end": 0.5, "by": 0.1}, "a linear has no by"),
        ({"kind": "linear", "start": "1", "end": 0.5}, "must be a finite number"),
        ({"kind": "linear", "start": 1.0, "end": 0.5, "steps": "x"}, "'x' in 'x' is no number"),
        ({"kind": "staircase", "start": 1.0, "end": 0.5, "by": -0.1}, "by must be above 0"),
        ({"kind": "staircase", "start": 1.0, "end": 0.5, "by": 0.1, "every": 0}, "every must be an int of at least 1"),
        ({"kind": "table"}, "a table needs values"),
        ({"kind": "table", "values": 3}, "values must be a list"),
        ({"kind": "table", "values": [math.nan]}, "must be a finite number"),
        ({"kind": "table", "values": [1], "length": 3}, "unknown key 'length'"),
    ],
)
def test_wrong_schedules_are_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        Schedule.parse(table)


def test_a_step_outside_a_schedule_is_an_error() -> None:
    table, line = Schedule(kind="table", values=(1.0, 0.5)), Schedule(kind="linear", start=1.0, end=0.0)
    with pytest.raises(PolicyError, match="keep_ratio: the table ends after 2 steps, this is step 2 of 9"):
        table.at(Step(2, 9), "keep_ratio")
    with pytest.raises(PolicyError, match=r"keep_ratio follows the steps .* and no step is set"):
        table.at(None, "keep_ratio")
    with pytest.raises(PolicyError, match="has no last step"):
        line.at(Step(2), "keep_ratio")


def test_rules_take_schedules_and_a_number_for_each_head() -> None:
    line = {"kind": "linear", "start": 1.0, "end": 0.1, "steps": ":20"}
    for value, normal in ((line, Schedule(**line)), ([0.1, 1], (0.1, 1.0)), ((0.5,), (0.5,))):
        rule = Rule("sla", params={"keep_ratio": value})
        assert dict(rule.params)["keep_ratio"] == normal
        policy = Policy([rule])
        assert Policy.load(policy.to_dict()) == policy
        assert hash(policy) == hash(Policy.load(policy.to_dict()))


def test_sparsity_is_one_minus_a_schedule() -> None:
    line = Schedule(kind="linear", start=0.0, end=0.9)
    rule = Rule("sla, vsa", params={"sparsity": line})
    assert backend("vsa").own(rule.params) == (("sparsity", line),)
    assert backend("sla").own(rule.params) == (("keep_ratio", Schedule(kind="linear", start=1.0, end=0.1)),)
    heads = Rule("sla, vsa", params={"sparsity": [0.9, 0.5]})
    assert backend("sla").own(heads.params) == (("keep_ratio", (0.1, 0.5)),)


def test_the_schedules_of_the_page_are_rules() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from sparseattn import Rule, Schedule.*?)```", page, re.DOTALL)
    lines = ast.parse(example).body
    names: dict[str, Any] = {}
    exec(compile(ast.Module(lines[:1], []), "policy.md", "exec"), names)
    rules = [eval(compile(ast.Expression(line.value), "policy.md", "eval"), names) for line in lines[1:]]
    assert [rule.use for rule in rules] == [("block_topk",), ("vsa",), ("sla",)]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"keep_ratio": {"kind": "linear", "start": 2.0, "end": 0.1}}, "keep_ratio must be in"),
        ({"keep_ratio": [0.1, 1.5]}, "keep_ratio must be in"),
        ({"keep_ratio": []}, "a list of numbers, one for each head"),
        ({"keep_ratio": ["x"]}, "a list of numbers, one for each head"),
        ({"block_q": [64, 64]}, "block_q must be one int for all heads and steps"),
        ({"feature_map": {"kind": "table", "values": [1]}}, "feature_map must be one str for all heads and steps"),
    ],
)
def test_values_that_a_parameter_cannot_have(params: dict[str, Any], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        Rule("sla", params=params)
