"""`sparseattn calibrate`: what it writes and prints, its exit codes, and what it leaves alone."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

import sparseattn
from sparseattn import Policy, Rule
from sparseattn.fx_passes import cli
from sparseattn.fx_passes.calibration.calibrate import Weigh
from sparseattn.fx_passes.cli import main

TARGET = Path(__file__).parents[1] / "support" / "calibration_target.py"
RATIOS = (0.95, 0.75, 0.5, 0.25)
LADDER = [Rule("block_topk", params={"keep_ratio": ratio, "block_q": 16, "block_k": 16}) for ratio in RATIOS]


@pytest.fixture
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("candidates") / "ladder.toml"
    Policy(LADDER, "ladder").save(path)
    return path


def command(ladder: Path, out: Path, name: str = "several", budget: object = 0.5, *more: object) -> list[str]:
    given = [f"{TARGET}:{name}", "--budget", budget, "-o", out, "--candidates", ladder, "--objective", "work", *more]
    return ["calibrate", *map(str, given)]


def run(capsys: pytest.CaptureFixture[str], *given: object) -> tuple[int, str, str]:
    code = main(command(*given))
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize("name", ["one", "keywords", "several"])
@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_the_policy_is_written_and_summed_up(
    name: str, suffix: str, ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"policy.{suffix}"
    code, told, err = run(capsys, ladder, out, name)
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.state"}
    policy = Policy.load(out)
    assert policy.measured is not None
    assert policy.measured.error <= 0.5
    lines = dict(line.split(maxsplit=1) for line in told.splitlines())
    assert list(lines) == ["policy", "budget", "error", "density", "sites", "state"]
    assert lines["policy"] == f"{out} ({policy.hash})"
    assert lines["budget"] == "0.5 relative_l1"
    assert lines["error"] == f"{policy.measured.error:.3g}"
    assert lines["density"] == f"{policy.measured.density:.3g}"
    assert lines["sites"].startswith("2 rewritten; ")


def test_it_is_what_python_gives(ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "policy.toml"
    assert run(capsys, ladder, out, "steps", 0.3, "--total-steps", 4, "--buckets", 2, "--metric", "relative_l2")[0] == 0
    module = cli.load_target.__globals__["_load_file"](TARGET)
    options = {"total_steps": 4, "buckets": 2, "metric": "relative_l2", "objective": "work", "progress": False}
    policy = sparseattn.calibrate(*module.steps(), budget=0.3, candidates=LADDER, **options)
    assert untimed(out.read_text(encoding="utf-8")) == untimed(policy.to_toml())


def untimed(text: str) -> list[str]:
    """The lines of a policy file, without what a clock or a calendar said."""
    return [line for line in text.splitlines() if not line.startswith(("date =", "speedup =", "predicted_speedup ="))]


def test_explain_takes_the_same_function(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "keywords", "several", "steps"):
        assert main(["explain", f"{TARGET}:{name}", "--policy", "exact"]) == 0
        assert "2 attention sites: 2 flash" in capsys.readouterr().out
    assert main(["explain", f"{TARGET}:none"]) == 2
    assert "returns no samples" in capsys.readouterr().err


def test_one_candidate_of_a_large_error_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Policy(LADDER[-1:]).save(tmp_path / "coarse.toml")
    assert run(capsys, tmp_path / "coarse.toml", tmp_path / "policy.toml", "one", 0.5)[0] == 0


def test_nothing_is_written_where_only_dense_attention_will_do(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "policy.toml"
    code, told, _ = run(capsys, ladder, out, "one", 1e-9)
    assert code == 1
    assert told == f"nothing but dense attention is within a budget of 1e-09 relative_l1; {out} is not written\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "policy.toml.state"]


def test_a_policy_is_replaced_only_by_force(ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "policy.toml"
    Policy([Rule("flash")]).save(out)
    before = out.read_bytes()
    code, _, err = run(capsys, ladder, out, "one")
    assert code == 2
    assert err == f"calibrate: {out} exists. Name another file, or say --force to replace it.\n"
    assert out.read_bytes() == before
    assert run(capsys, ladder, out, "one", 1e-9, "--force")[0] == 1
    assert out.read_bytes() == before
    assert run(capsys, ladder, out, "one", 0.5, "--force")[0] == 0
    assert Policy.load(out).rules[0].use == ("block_topk",)


def test_a_result_that_cannot_be_written_is_shown(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run(capsys, ladder, tmp_path / "policy.toml", "one")
    assert code == 2
    assert "policy.toml cannot be written: No space left on device. What was measured is in " in err
    assert list(tmp_path.iterdir()) == [tmp_path / "policy.toml.state"]


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("none", (), "calibration_target.py:none returns no samples. Give at least one tuple of the model's inputs."),
        ("tensors", (), "returns a list, which is one of samples, each a tuple, a dict or a Sample, got Tensor."),
        ("model", (), "must be a function that returns (model, inputs)"),
        ("one", ("--budget", "0"), "calibrate: budget must be a positive number, an error in relative_l1, got 0.0."),
        ("one", ("--budget", "-0.1"), "calibrate: budget must be a positive number, an error in relative_l1, got -0.1"),
        ("one", ("--budget", "nan"), "calibrate: budget must be a positive number, an error in relative_l1, got nan."),
        ("one", ("--total-steps", "4"), "for samples that name their step"),
        ("steps", ("--total-steps", "3"), "calibrate: step 3 is not in 0 ... 2."),
        ("steps", (), "total_steps says how many there are"),
        ("steps", ("--total-steps", "8", "--buckets", "2"), "calibrate: no sample has a step in 4 ... 7."),
        ("steps", ("--total-steps", "4", "--buckets", "5"), "calibrate: buckets must be in 1 ... 4"),
        ("one", ("--candidates", "flsh"), "flsh"),
        ("one", ("--candidates", ""), "backend"),
        ("one", ("--candidates", "{}/newer.toml"), "newer.toml: version must be 1, the newest that this release reads"),
        ("one", ("--candidates", "{}/corrupted.json"), "corrupted.json: not valid JSON"),
        ("one", ("--candidates", "{}/none.toml"), "none.toml: cannot be read"),
        ("one", ("-o", "{}/policy.yaml"), "--output must end in .toml or .json"),
        ("one", ("-o", "{}/nowhere/policy.toml"), "there is no folder"),
        ("one", ("-o", "{}/folder.toml"), "folder.toml cannot be written"),
        ("one", ("--state", "{}/nowhere/state"), "there is no folder"),
        ("one", ("--state", "{}/folder.toml"), "folder.toml cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_leave_the_files(
    name: str,
    more: tuple[str, ...],
    says: str,
    ladder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file, text in (
        ("newer.toml", "version = 2\n"),
        ("corrupted.json", '{"version": '),
        ("old.toml", "version = 1"),
    ):
        (tmp_path / file).write_text(text)
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "old.toml.state").write_bytes(b"of something else")
    before = contents(tmp_path)
    given = [word.format(tmp_path) for word in more]
    code, out, err = run(capsys, ladder, tmp_path / "old.toml", name, 0.5, "--force", *given)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_environment_that_leaves_all_dense_is_refused(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEATTN_DISABLE", "1")
    code, _, err = run(capsys, ladder, tmp_path / "policy.toml", "one")
    assert code == 2
    assert "SPARSEATTN_DISABLE is set" in err


def test_every_keyword_of_calibrate_has_a_flag() -> None:
    (verbs,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    verb = verbs.choices["calibrate"]
    flags = {action.dest for action in verb._actions}
    keywords = {p.name for p in inspect.signature(sparseattn.calibrate).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords <= flags
    assert flags - keywords == {"target", "output", "force", "help"}
    assert next(flag for flag in verb._actions if flag.dest == "weigh").choices == get_args(Weigh)


def test_dynamo_is_only_loaded_where_it_is_needed() -> None:
    code = "import sys; from sparseattn.fx_passes import cli; cli.main(['env']); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def every_verb(parser: argparse.ArgumentParser, *before: str) -> list[tuple[str, ...]]:
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    inner = [
        found for verbs in nested for name, verb in verbs.choices.items() for found in every_verb(verb, *before, name)
    ]
    return [before, *inner]


VERBS = every_verb(cli._parser())


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*verb, "--help"])
    told = capsys.readouterr()
    assert (left.value.code, told.err) == (0, "")
    assert told.out.startswith(f"usage: {' '.join(['sparseattn', *verb])} ")
    names = told.out.partition("\noptions:\n")[2].partition("\n\n")[0].splitlines()
    assert names
    described = [line for line in names if len(line.split("  ")) > 2 or line.startswith(" " * 10)]
    assert len(described) >= sum(line.startswith("  -") for line in names)


def test_the_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    names = [verb[0] for verb in VERBS if len(verb) == 1]
    assert {"backends", "explain", "calibrate", "policy", "bench", "tune", "env"} <= set(names)
    for name in names:
        assert f"\n    {name} " in told
        assert name in told.partition("\n\n")[0].split()


def test_ctrl_c_says_how_to_go_on(ladder: Path, tmp_path: Path) -> None:
    out = tmp_path / "policy.toml"
    state = tmp_path / "policy.toml.state"
    start = "import sys; from sparseattn.fx_passes.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", start, *command(ladder, out, "endless")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # It would be ignored where the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told, err = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "")
    assert err == f"interrupted: what was measured is in {state}. Run the same command again to go on.\n"
    assert not out.exists()
    assert state in set(tmp_path.iterdir()) <= {state, tmp_path / "policy.toml.state.part"}


def test_ctrl_c_before_anything_was_measured(
    ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparseattn.fx_passes.calibration.calibrate.calibrate", interrupted)
    code, _, err = run(capsys, ladder, tmp_path / "policy.toml", "one")
    assert (code, err) == (130, "interrupted: nothing was measured yet.\n")
    assert list(tmp_path.iterdir()) == []
