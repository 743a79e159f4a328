"""A calibration that is killed, wherever it is, and started again gives the policy of one that ran through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "killed_calibrations.py"
SEEDS = ("0", "1", "2")
POINTS = ("torn", "unreplaced", "replaced", "policy")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script tells of all its runs."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path_factory.mktemp("killed")), *SEEDS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def untimed(text: str) -> list[str]:
    """The lines of a policy file, without what a clock or a calendar said."""
    return [line for line in text.splitlines() if not line.startswith(("date =", "speedup =", "predicted_speedup ="))]


def test_one_that_runs_through_chooses_something(told: dict[str, Any]) -> None:
    assert told["whole"]["ends"] == [0]
    assert told["whole"]["left"] == ["policy.toml.state"]
    assert told["whole"]["policy"].count("[[rules]]") == 2


@pytest.mark.parametrize("name", [*SEEDS, *POINTS])
def test_a_killed_one_gives_the_same_file(name: str, told: dict[str, Any]) -> None:
    run = told["runs"][name]
    *killed, last = run["ends"]
    assert last == 0
    assert set(killed) <= {-signal.SIGKILL}
    assert untimed(run["policy"]) == untimed(told["whole"]["policy"])
    assert run["left"] == ["policy.toml.state"]


def test_they_were_killed_where_it_matters(told: dict[str, Any]) -> None:
    ends = {name: told["runs"][name]["ends"] for name in POINTS}
    kill = -signal.SIGKILL
    assert ends == {
        "torn": [kill, kill, 0],
        "unreplaced": [kill, kill, 0],
        "replaced": [kill, kill, 0],
        "policy": [kill, 0],
    }
    states = {name: told["runs"][name]["states"][:-1] for name in POINTS}
    assert states == {"torn": [False, True], "unreplaced": [False, True], "replaced": [True, True], "policy": [True]}
    assert any(len(told["runs"][seed]["ends"]) > 1 for seed in SEEDS)
