import json
import re
from pathlib import Path

import pytest

from sparseattn.lowering import precedence, presets
from sparseattn.lowering.policy import Policy
from sparseattn.lowering.policy_file import _MEASURED_KEYS, _PART_KEYS, _RULE_KEYS

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.usefixtures("stand_ins")


def block(language: str, holding: str) -> str:
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if holding in text]
    assert len(found) == 1
    return found[0]


def test_the_spellings_are_one_policy(tmp_path):
    path = tmp_path / "wan.toml"
    path.write_text(block("toml", "[[rules]]"), encoding="utf-8")
    from_toml = Policy.load(path)
    assert from_toml == Policy.load(json.loads(block("json", "rules")))
    assert len(from_toml.rules) == 3


def test_the_example_of_what_was_measured_is_complete(tmp_path):
    path = tmp_path / "wan.toml"
    path.write_text(block("toml", "[[rules]]") + block("toml", "[measured]"), encoding="utf-8")
    measured = Policy.load(path).measured
    assert set(measured.to_dict()) == set(_MEASURED_KEYS)
    for name, keys in _PART_KEYS.items():
        assert set(getattr(measured, name)[0].to_dict()) == set(keys)


def test_the_python_example_runs():
    names: dict[str, object] = {}
    exec(block("python", "policy = Policy("), names)
    policy = names["policy"]
    assert isinstance(policy, Policy)
    assert [rule.mode for rule in policy.rules] == ["prefer", "never", "prefer", "prefer"]


def test_every_field_preset_and_variable_is_on_the_page():
    for name in (*_RULE_KEYS, *_MEASURED_KEYS, *presets.PRESETS, precedence.DISABLE, precedence.POLICY):
        assert f"`{name}`" in PAGE
