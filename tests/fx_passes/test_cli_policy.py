"""`sparseattn policy show | diff | validate`: what they print, their exit codes, and that no file is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseattn import Measured, MeasuredRule, Policy, Rule
from sparseattn.fx_passes.cli import main

MODEL = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 16)
    def forward(self, q):
        q = self.project(q)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)
def build():
    return Model(), (torch.randn(1, 2, 64, 16),)
def keywords():
    return Model(), {"q": torch.randn(1, 2, 64, 16)}
def broken():
    raise ValueError("no weights\\nat all")
def unreachable():
    class Odd(torch.nn.Module):
        def forward(self, q):
            return q.nothing_of_this_name
    return Odd(), (torch.randn(1),)
nothing = 3
def alone():
    return Model()
"""
RULES = [Rule("dense", modules="blocks.0.*", why="layout"), Rule("block_topk, flash", params={"keep_ratio": 0.3})]
SPARSER = Rule("block_topk, flash", params={"keep_ratio": 0.2})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a model and policies; whatever the test does, they are as they were."""
    (tmp_path / "a_model.py").write_text(MODEL)
    Policy(RULES, "a").save(tmp_path / "a.toml")
    Policy([Rule("flash")], "fits").save(tmp_path / "fits.json")
    (tmp_path / "bad.toml").write_text('[[rules]]\nuse = "flsh"\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    yield tmp_path
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["policy", *map(str, arguments)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy(RULES, "a")
    path = tmp_path / "a.toml"
    policy.save(path)
    code, out, _ = run(capsys, "show", path)
    assert code == 0
    assert out.splitlines() == [
        f"policy a ({policy.hash}): 2 rules",
        "rule  use               mode    where               params          why",
        "1     dense             prefer  modules=blocks.0.*                  layout",
        "2     block_topk,flash  prefer                      keep_ratio=0.3",
        "not measured",
    ]
    record = Measured(device="sm90", policy=policy.hash, error=0.013, rules=[MeasuredRule(2, 0.009, 0.3)])
    Policy(RULES, "a", measured=record).save(path)
    _, out, _ = run(capsys, "show", path)
    lines = out.splitlines()
    assert lines[1].split() == ["rule", "use", "mode", "where", "params", "error", "density", "why"]
    assert lines[3].split()[-2:] == ["0.009", "0.3"]
    assert lines[4:] == ["measured", f"  policy  {policy.hash}", "  device  sm90", "  error   0.013"]
    Policy(RULES[1:], "a", measured=Measured(policy=policy.hash)).save(path)
    assert f"  policy  {policy.hash}, the rules were edited since\n" in run(capsys, "show", path)[1]


def test_show_a_preset_and_an_empty_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", "fast")
    assert code == 0
    assert "keep_ratio=0.3" in out
    Policy([]).save(tmp_path / "empty.toml")
    assert run(capsys, "show", tmp_path / "empty.toml")[1].splitlines()[1:] == ["not measured"]


def test_diff_of_what_decides_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.json"
    Policy(RULES, "a").save(first)
    relabelled = [Rule("dense", modules="blocks.0.*", why="another reason"), RULES[1]]
    Policy(relabelled, "b", measured=Measured(error=0.1)).save(second)
    assert run(capsys, "diff", first, first)[:2] == (0, f"they decide alike ({Policy(RULES).hash})\n")
    code, out, _ = run(capsys, "diff", first, second)
    assert (code, out) == (0, f"they decide alike ({Policy(RULES).hash}); what was measured differs\n")


@pytest.mark.parametrize(
    ("other", "lines"),
    [
        (
            [RULES[0], SPARSER],
            ["  rule 2: params.keep_ratio: 0.3 -> 0.2"],
        ),
        (
            [RULES[0], Rule("block_topk, flash", min_seq=2048, mode="require")],
            [
                "  rule 2: mode: prefer -> require",
                "  rule 2: params.keep_ratio: 0.3 -> not set",
                "  rule 2: min_seq: not set -> 2048",
            ],
        ),
        ([RULES[1]], ["- rule 1: prefer dense where modules='blocks.0.*' (layout)"]),
        ([*RULES, Rule("flash")], ["+ rule 3: prefer flash"]),
        (
            [Rule("flash", kind="cross"), RULES[0], SPARSER],
            ["+ rule 1: prefer flash where kind='cross'", "  rule 2 -> 3: params.keep_ratio: 0.3 -> 0.2"],
        ),
        ([RULES[0], Rule("flash")], [f"- rule 2: {RULES[1]}", "+ rule 2: prefer flash"]),
        (RULES[::-1], None),
    ],
)
def test_diff(other: list[Rule], lines: list[str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Policy(RULES).save(tmp_path / "a.toml")
    Policy(other).save(tmp_path / "b.toml")
    code, out, _ = run(capsys, "diff", tmp_path / "a.toml", tmp_path / "b.toml")
    told = out.splitlines()
    assert code == 1
    assert told[0] == f"--- {tmp_path / 'a.toml'} ({Policy(RULES).hash})"
    assert told[1] == f"+++ {tmp_path / 'b.toml'} ({Policy(other).hash})"
    assert len(told) > 2
    if lines is not None:
        assert told[2:] == lines


def test_validate_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "validate", folder / "a.toml")
    assert (code, out) == (0, f"{folder / 'a.toml'}: valid, policy a ({Policy(RULES).hash}): 2 rules\n")


@pytest.mark.parametrize("factory", ["build", "keywords"])
def test_validate_against_a_model(folder: Path, factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "validate", folder / "fits.json", f"{folder}/a_model.py:{factory}")
    assert code == 0
    assert "1 attention site: 1 flash" in out
    assert "note" not in out
    code, out, _ = run(capsys, "validate", folder / "a.toml", f"{folder}/a_model.py:{factory}")
    assert code == 1
    assert out.splitlines()[-1] == "note: rule 1 matches no site: prefer dense where modules='blocks.0.*' (layout)"


def test_validate_is_about_this_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = "validate", folder / "fits.json", f"{folder}/a_model.py:build"
    monkeypatch.setenv("SPARSEATTN_POLICY", str(folder / "a.toml"))
    assert run(capsys, *arguments)[0] == 0
    monkeypatch.setenv("SPARSEATTN_DISABLE", "1")
    code, _, err = run(capsys, *arguments)
    assert (code, err) == (2, "policy validate: SPARSEATTN_DISABLE switches every policy off. Unset it.\n")


def test_validate_says_that_a_rule_cannot_be_met(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path_factory.mktemp("policy") / "require.toml"
    Policy([Rule("sage", mode="require", provider="triton")]).save(path)
    code, out, err = run(capsys, "validate", path, f"{folder}/a_model.py:build", "--capability", "cpu")
    assert code == 1
    assert not out
    assert err.startswith("rule 1 requires sage")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "{}/bad.toml"], "bad.toml: rule 1: use: unknown backend 'flsh'"),
        (["show", "{}/none.toml"], "none.toml: cannot be read: No such file"),
        (["diff", "{}/a.toml", "{}/bad.toml"], "bad.toml: rule 1: use: unknown backend 'flsh'"),
        (["validate", "{}/bad.toml"], "bad.toml: rule 1: use: unknown backend 'flsh'"),
        (["validate", "{}/a.toml", "build"], "target must be FILE.py:NAME or package.module:NAME, got 'build'"),
        (["validate", "{}/a.toml", "{}/no.py:build"], "there is no file"),
        (["validate", "{}/a.toml", "no.such.module:build"], "ModuleNotFoundError: No module named 'no'"),
        (["validate", "{}/a.toml", "{}/a_model.py:none"], "has no 'none'"),
        (["validate", "{}/a.toml", "{}/a_model.py:nothing"], "must be a function that returns (model, inputs)"),
        (["validate", "{}/a.toml", "{}/a_model.py:alone"], "must be a function that returns (model, inputs)"),
        (["validate", "{}/a.toml", "{}/a_model.py:broken"], "broken: ValueError: no weights (/"),
        (["validate", "{}/a.toml", "{}/a_model.py:unreachable"], "nothing_of_this_name"),
        (["validate", "{}/a.toml", "{}/a_model.py:build", "--capability", "H100"], "Capability.of: name must be"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *(argument.format(folder) for argument in arguments))
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("show", "diff", "validate"):
        with pytest.raises(SystemExit) as left:
            main(["policy", action, "--help"])
        assert left.value.code == 0
        assert "Exit code: 0" in capsys.readouterr().out
