"""What a policy was measured on: a record that files keep to the last bit, and that decides nothing."""

import dataclasses
import datetime
import json
import pickle
import sys

import pytest

from sparseattn import Capability, Measured, MeasuredRule
from sparseattn.attn_ops.errors import PolicyError
from sparseattn.lowering.policy import Policy, Rule
from sparseattn.lowering.precedence import policy_state, use_policy

RULES = [Rule("dense", modules="blocks.0.*"), Rule("block_topk", params={"keep_ratio": 0.3}, why="measured")]


def everything() -> Measured:
    return Measured(
        model="5cc1b1f0a3d7",
        policy=Policy(RULES).hash,
        torch="2.13.0+cpu",
        sparseattn="0.1.0",
        device="cpu-avx512",
        date="2026-11-21",
        metric='relative L2 of the "output"',
        budget=0.1 + 0.2,
        error=1e-05,
        predicted_speedup=2.0000000000000004,
        speedup=1 / 3,
        density=5e-324,
        rules=[MeasuredRule(2, error=0.1, density=0.3), MeasuredRule(1)],
    )


RECORDS = [everything, Measured, lambda: Measured(error=sys.float_info.max), lambda: Measured(rules=[MeasuredRule(1)])]


@pytest.mark.parametrize("make", RECORDS)
@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_file_gives_back_what_was_measured(make, suffix, tmp_path):
    policy = Policy(RULES, "tuned", measured=make())
    path = tmp_path / f"p{suffix}"
    policy.save(path)
    loaded = Policy.load(path)
    assert loaded == policy
    assert loaded.measured == policy.measured
    assert loaded.to_dict() == policy.to_dict() == json.loads(policy.to_json())


def test_a_policy_without_rules_keeps_it(tmp_path):
    policy = Policy([], measured=Measured(date="2026-11-21"))
    for suffix in (".toml", ".json"):
        policy.save(tmp_path / f"p{suffix}")
        assert Policy.load(tmp_path / f"p{suffix}").measured == policy.measured


def test_to_toml_is_what_a_person_would_write():
    measured = Measured(device="sm90", error=0.013, rules=[MeasuredRule(1, density=0.3)])
    assert Policy([Rule("flash")], "p", measured=measured).to_toml() == (
        'version = 1\nname = "p"\n\n[[rules]]\nuse = "flash"\n\n'
        '[measured]\ndevice = "sm90"\nerror = 0.013\n\n[[measured.rules]]\nrule = 1\ndensity = 0.3\n'
    )


def test_a_file_without_it_loads_as_before(tmp_path):
    path = tmp_path / "old.toml"
    path.write_text('version = 1\n[[rules]]\nuse = "flash"\n', encoding="utf-8")
    assert Policy.load(path).measured is None
    assert "measured" not in Policy.load(path).to_dict()


def test_it_is_a_value():
    assert everything() == everything()
    assert hash(everything()) == hash(everything())
    assert pickle.loads(pickle.dumps(everything())) == everything()
    assert everything() != dataclasses.replace(everything(), speedup=1.0)


def test_policies_that_differ_only_in_it_are_one_to_the_compiler():
    bare, tuned = Policy(RULES), Policy(RULES, measured=everything())
    assert bare == tuned
    assert hash(bare) == hash(tuned)
    assert bare.hash == tuned.hash
    with use_policy(bare):
        compiled_under = policy_state()
    with use_policy(tuned):
        assert policy_state() == compiled_under


@pytest.mark.parametrize("name", ["cpu", "cpu-avx512", "sm90", "sm89", "sm110"])
def test_a_capability_as_text_is_a_device(name):
    assert Measured(device=str(Capability.of(name))).device == name


def test_numbers_and_dates_have_one_normal_form():
    measured = Measured(budget=1, density=0, date=datetime.date(2026, 11, 21))
    assert [type(value) for value in (measured.budget, measured.density)] == [float, float]
    assert measured.date == "2026-11-21"
    by_toml = Policy.load({"rules": [], "measured": {"date": datetime.date(2026, 11, 21)}})
    assert by_toml.measured == Measured(date="2026-11-21")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[measured]\nspeed = 2.0", ["measured: unknown key 'speed'", 'Did you mean "speedup"?']),
        ("[measured]\ndensity = 1.5", ["measured: density must be a number from 0 to 1, got 1.5", "density = 0.3"]),
        ("[measured]\nerror = -0.1", ["measured: error must be a finite number of at least 0", "got -0.1"]),
        ("[measured]\nerror = nan", ["measured: error must be", "got nan"]),
        ("[measured]\nbudget = inf", ["measured: budget must be", "got inf"]),
        ("[measured]\nbudget = true", ["measured: budget must be", "got True"]),
        ('[measured]\nspeedup = "2x"', ["measured: speedup must be a positive number, got '2x'"]),
        ("[measured]\npredicted_speedup = 0", ["measured: predicted_speedup must be a positive number, got 0"]),
        ('[measured]\ndevice = "H100"', ["measured: device must be", "got 'H100'", 'device = "sm90"']),
        ('[measured]\ndate = "21.11.2026"', ["measured: date must be a day, YYYY-MM-DD, got '21.11.2026'"]),
        ('[measured]\ndate = "20261121"', ["measured: date must be a day, YYYY-MM-DD, got '20261121'"]),
        ("[measured]\ndate = 2026-11-21T10:00:00", ["measured: date must be a day"]),
        ("[measured]\ntorch = 2.13", ["measured: torch must be a version, a str, got 2.13"]),
        ("[measured]\nmodel = 5", ["measured: model must be the model's fingerprint, a str, got 5"]),
        ("[[measured.rules]]\nerror = 0.1", ["measured: rule 1: rule is missing", "rule = 1"]),
        ("[[measured.rules]]\nrule = 0", ["measured: rule 1: rule must be the number of a rule, from 1, got 0"]),
        ("[[measured.rules]]\nrule = 1\ndense = 1", ["measured: rule 1: unknown key 'dense'", '"density"']),
        (
            "[[measured.rules]]\nrule = 1\n[[measured.rules]]\nrule = 1",
            ["must be a list that names each rule once"],
        ),
        ("[[measured.rules]]\nrule = 2", ["measured: there is no rule 2, the policy has 1"]),
        ("[measured]\nrules = 3", ["measured: rules must be a list of tables, got 3", "[[measured.rules]]"]),
        ("[[measured]]\nerror = 0.1", ["measured: must be a table, got [{'error': 0.1}]"]),
    ],
)
def test_mistakes_say_where_and_leave_the_file_as_it_was(text, parts, tmp_path):
    path = tmp_path / "policy.toml"
    content = f'[[rules]]\nuse = "flash"\n{text}\n'
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PolicyError) as raised:
        Policy.load(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert path.read_text(encoding="utf-8") == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_newer_file_is_told_from_a_misspelt_one(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text("version = 2\nrules = []\nsomething_new = 1\n", encoding="utf-8")
    with pytest.raises(PolicyError, match=r"version must be 1, the newest that this release reads, got 2\. Update"):
        Policy.load(path)


@pytest.mark.parametrize("given", [{"error": 0.1}, 3, "measured"])
def test_a_policy_takes_nothing_else_for_it(given):
    with pytest.raises(PolicyError, match="measured must be a Measured or None"):
        Policy(RULES, measured=given)
