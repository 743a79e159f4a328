"""Bad input of calibrate, in Python and on the command line: a clear error, and every file as it was."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import calibration_target as target

import sparseattn
from sparseattn import Policy, Rule
from sparseattn.attn_ops.errors import SparseAttnError
from sparseattn.fx_passes.cli import main

LADDER = [Rule("block_topk", params={"keep_ratio": 0.5, "block_q": 16, "block_k": 16})]
FLAGS = {"budget": "--budget", "total_steps": "--total-steps", "buckets": "--buckets"}

Calibrate = Callable[..., None]


@pytest.fixture(params=["python", "command line"])
def calibrate(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Calibrate:
    """Calibrate what a function of the target returns, with the state in state.pt, one way or the other."""

    def in_python(name: str, **options: Any) -> None:
        given = {"budget": 0.5, "candidates": LADDER, "objective": "work", "progress": False, **options}
        model, samples = getattr(target, name)()
        samples = samples if isinstance(samples, list) else [samples]
        sparseattn.calibrate(model, samples, state=tmp_path / "state.pt", **given)

    def on_the_command_line(name: str, **options: Any) -> None:
        words = [str(word) for key, value in {"budget": 0.5, **options}.items() for word in (FLAGS[key], value)]
        files = [
            "-o",
            tmp_path / "policy.toml",
            "--state",
            tmp_path / "state.pt",
            "--candidates",
            tmp_path / "ladder.toml",
        ]
        place = f"{target.__file__}:{name}"
        code = main(["calibrate", place, *map(str, files), "--force", "--objective", "work", *words])
        told = capsys.readouterr()
        assert (code, told.out) == (2, "")
        raise SparseAttnError(told.err)

    Policy(LADDER).save(tmp_path / "ladder.toml")
    Policy([Rule("flash")], "old").save(tmp_path / "policy.toml")
    return in_python if request.param == "python" else on_the_command_line


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The state of a calibration of `one` that measured everything."""
    path = tmp_path_factory.mktemp("measured") / "state.pt"
    options = {"budget": 0.5, "candidates": LADDER, "objective": "work", "progress": False}
    sparseattn.calibrate(*_one(), state=path, **options)
    return path.read_bytes()


@pytest.fixture
def state(tmp_path: Path, measured: bytes) -> Path:
    """A file of it, in the folder of the test."""
    path = tmp_path / "state.pt"
    path.write_bytes(measured)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("none", {}, r"no samples\. Give at least one tuple of the model's inputs"),
        ("one", {"budget": 0}, "budget must be a positive number"),
        ("one", {"budget": -0.02}, "budget must be a positive number"),
        ("one", {"budget": float("nan")}, "budget must be a positive number"),
        ("one", {"budget": float("inf")}, "budget must be a positive number"),
        ("steps", {"total_steps": 3}, r"step 3 is not in 0 \.\.\. 2"),
        ("steps", {"total_steps": 8, "buckets": 2}, r"no sample has a step in 4 \.\.\. 7"),
        ("several", {}, r"state\.pt is of another calibration: samples, values differ"),
        ("without_attention", {}, r"state\.pt is of another calibration: model, values differ"),
    ],
)
def test_the_files_stay_as_they_were(
    name: str, options: dict[str, Any], says: str, calibrate: Calibrate, state: Path
) -> None:
    before = contents(state.parent)
    with pytest.raises(SparseAttnError, match=says):
        calibrate(name, **options)
    assert contents(state.parent) == before


class Harmful:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def newer(path: Path) -> None:
    kept = torch.load(path, weights_only=True)
    kept["header"]["version"] += 1
    torch.save(kept, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"seconds", b"secondz")),
    "text": lambda path: path.write_text("version = 1\n"),
    "another object": lambda path: torch.save([1, 2], path),
    "newer": newer,
    "newer, with other keys": lambda path: torch.save({"header": {"version": 1000}, "sums": []}, path),
    "harmful": lambda path: path.write_bytes(pickle.dumps({"header": Harmful()}, protocol=2)),
    "harmful, of torch": lambda path: torch.save({"header": Harmful()}, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_state_that_cannot_be_read_is_left(
    damage: Callable[[Path], object], calibrate: Calibrate, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(state)
    before = contents(state.parent)
    monkeypatch.chdir(state.parent)  # where harm would be done
    with pytest.raises(SparseAttnError, match=r"state\.pt is (not the state of a|of another) calibration"):
        calibrate("one")
    assert contents(state.parent) == before


def test_a_state_that_is_harmful_is_told_on_one_line(state: Path) -> None:
    DAMAGES["harmful"](state)
    with pytest.raises(SparseAttnError) as refused:
        sparseattn.calibrate(*_one(), budget=0.5, candidates=LADDER, state=state, progress=False)
    assert "weights_only" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_without_attention_is_refused_and_leaves_no_state(calibrate: Calibrate, tmp_path: Path) -> None:
    before = contents(tmp_path)
    with pytest.raises(SparseAttnError, match="no candidate can serve an attention of this model"):
        calibrate("without_attention")
    assert contents(tmp_path) == before


def _one() -> tuple[Any, list[Any]]:
    model, sample = target.one()
    return model, [sample]
