import json
from pathlib import Path

import pytest

from sparseattn.attn_ops.errors import PolicyError
from sparseattn.lowering.policy import Policy, Rule

pytestmark = pytest.mark.usefixtures("made_up")

TOML = """
version = 1
name = "video"

[[rules]]
use = "dense"
modules = ["blocks.0.*", "blocks.1.*"]
why = "first two blocks"

[[rules]]
use = ["blocks", "quant"]
kind = "self"
min_seq = 2048
only_if_faster = true
params = { keep_ratio = 0.25, bits = 8 }
"""


def video() -> Policy:
    return Policy(
        [
            Rule("dense", modules=("blocks.0.*", "blocks.1.*"), why="first two blocks"),
            Rule(
                ("blocks", "quant"),
                kind="self",
                min_seq=2048,
                only_if_faster=True,
                params={"keep_ratio": 0.25, "bits": 8},
            ),
        ],
        "video",
    )


def everything() -> Policy:
    return Policy(
        [
            Rule("quant", mode="never", provider="vendor"),
            Rule(
                "quant",
                modules="a.*",
                kind="cross",
                min_seq=1,
                max_seq=9,
                head_dim=64,
                dtype="bfloat16",
                mode="require",
            ),
            Rule("quant,plain", head_dim=(64, 128), dtype=("float16", "bfloat16"), params={"smooth": False}),
            Rule(
                "blocks", params={"keep_ratio": 1e-05}, why='quote " backslash \\ newline \n tab \t del \x7f, é, 注, 🙂'
            ),
            Rule("plain", provider="reference"),
        ],
        'odd "name"',
    )


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("make", [video, everything, lambda: Policy([]), lambda: Policy([Rule("dense")], "")])
@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_file_gives_back_the_policy(make, suffix, tmp_path):
    policy = make()
    path = tmp_path / f"p{suffix}"
    policy.save(path)
    for source in (path, str(path)):
        loaded = Policy.load(source)
        assert loaded == policy
        assert loaded.hash == policy.hash


@pytest.mark.parametrize("make", [video, everything])
def test_a_dictionary_gives_back_the_policy(make):
    policy = make()
    assert Policy.load(policy.to_dict()) == policy
    assert Policy.load(json.loads(policy.to_json())) == policy


def test_load_passes_a_policy_through():
    policy = video()
    assert Policy.load(policy) is policy


def test_toml_reads_as_written(tmp_path):
    assert Policy.load(write(tmp_path, "video.toml", TOML)) == video()


def test_to_toml_is_what_a_person_would_write():
    assert video().to_toml() == (
        'version = 1\nname = "video"\n\n'
        '[[rules]]\nuse = "dense"\nmodules = ["blocks.0.*", "blocks.1.*"]\nwhy = "first two blocks"\n\n'
        '[[rules]]\nuse = ["blocks", "quant"]\nkind = "self"\nmin_seq = 2048\nonly_if_faster = true\n'
        "params = { bits = 8, keep_ratio = 0.25 }\n"
    )


def test_defaults_are_not_written():
    assert Policy([Rule("plain")], "p").to_dict() == {"version": 1, "name": "p", "rules": [{"use": "plain"}]}


def test_version_and_name_may_be_left_out(tmp_path):
    path = write(tmp_path, "short.toml", '[[rules]]\nuse = "plain"\n')
    assert Policy.load(path) == Policy([Rule("plain")], "short")
    assert Policy.load({"rules": [{"use": "plain"}]}) == Policy([Rule("plain")], "custom")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[[rules]]\nuse="plain"\n[[rules]]\nuse="plain"\nmin_seq="2k"', ["rule 2: min_seq must be an int", "'2k'"]),
        ('[[rules]]\nuse="plain"\nminseq=3', ["rule 1: unknown key 'minseq'", 'Did you mean "min_seq"?']),
        ('[[rules]]\nuse="plan"', ["rule 1: use: unknown backend 'plan'", 'Did you mean "plain"?']),
        ("[[rules]]\nmin_seq=3", ["rule 1: use is missing", 'use = "flash"']),
        ('[[rules]]\nuse="blocks"\nparams={keep=1}', ["rule 1: params: blocks has no parameter 'keep'", "keep_ratio"]),
        ('[[rules]]\nuse="blocks"\nparams={keep_ratio=2.0}', ["rule 1: params of blocks: keep_ratio must be in"]),
        ('[[rules]]\nuse="plain"\nmin_seq=9\nmax_seq=8', ["rule 1: min_seq 9 is larger than max_seq 8"]),
        ('[[rules]]\nuse="plain"\nsteps="ten:"', ["rule 1: steps: 'ten' in 'ten:' is no number", '"3:-3"']),
        ('[[rules]]\nuse="blocks"\nparams={keep_ratio={kind="lin"}}', ["keep_ratio: schedule: unknown kind 'lin'"]),
        ('[[rule]]\nuse="plain"', ["unknown key 'rule'", 'Did you mean "rules"?']),
        ('rules = "plain"', ["rules must be a list of tables, got 'plain'", "[[rules]]"]),
        ('rules = ["plain"]', ["rule 1: must be a table, got 'plain'", "Known keys: use, modules"]),
        ('name = "x"', ["rules is missing"]),
        ("version = 2\nrules = []", ["version must be 1", "got 2"]),
        ("name = 5\nrules = []", ["name must be a str, got 5"]),
        ("rules = [", ["not valid TOML"]),
    ],
)
def test_mistakes_in_a_file_say_where(text, parts, tmp_path):
    path = write(tmp_path, "policy.toml", text)
    with pytest.raises(PolicyError) as raised:
        Policy.load(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message


def test_invalid_json_says_where(tmp_path):
    with pytest.raises(PolicyError, match=r"policy\.json: not valid JSON: .*line 1"):
        Policy.load(write(tmp_path, "policy.json", "{"))


def test_json_that_is_no_table(tmp_path):
    with pytest.raises(PolicyError, match="must be a table, got \\[\\]"):
        Policy.load(write(tmp_path, "policy.json", "[]"))


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="not valid TOML"):
        Policy.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(PolicyError, match=r"none\.toml: cannot be read: No such file"):
        Policy.load(tmp_path / "none.toml")


def test_other_suffixes_are_refused(tmp_path):
    for act in (lambda: Policy.load(tmp_path / "policy.yaml"), lambda: video().save(tmp_path / "policy.yaml")):
        with pytest.raises(PolicyError, match=r"ends in \.toml or \.json, got '\.yaml'"):
            act()
    assert not list(tmp_path.iterdir())


def test_mistakes_in_a_dictionary_say_where():
    with pytest.raises(PolicyError, match="policy: rule 1: mode must be one of these"):
        Policy.load({"rules": [{"use": "plain", "mode": "maybe"}]})


@pytest.mark.parametrize("source", [3, None, ["plain"]])
def test_sources_of_other_types_are_refused(source):
    with pytest.raises(PolicyError, match="must be a Policy, a table, a path or the name of a preset"):
        Policy.load(source)


def test_a_path_without_suffix_is_taken_for_a_preset():
    with pytest.raises(PolicyError, match=r"unknown preset 'my/policy'.*A policy file ends in \.toml or \.json"):
        Policy.load("my/policy")
