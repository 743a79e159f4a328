"""Calibrations on the command line that are killed and started again, each in a process of its own.

    python killed_calibrations.py FOLDER SEED...  ->  JSON on stdout: {"whole": run, "runs": {name: run}}

A run is {"ends": how each of its processes ended, "states": whether there was a state file then, "policy": the text of
the policy file, "left": the other files that are there at the end}. The processes are forks of this one, which has
imported everything and has run the undisturbed calibration: that takes the time of an import out of each.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from sparseattn import Policy, Rule
from sparseattn.fx_passes.cli import main

TARGET = Path(__file__).with_name("calibration_target.py")
RATIOS = (0.95, 0.75, 0.5, 0.25)
POINTS = ("torn", "unreplaced", "replaced")


def calibration(folder: Path) -> Callable[[], int]:
    """A calibration whose files are in a folder."""
    folder.mkdir()
    candidates = folder.parent / "ladder.toml"
    given = [f"{TARGET}:four", "--budget", "0.2", "-o", str(folder / "policy.toml")]
    return lambda: main(["calibrate", *given, "--candidates", str(candidates), "--objective", "work", "--no-progress"])


def forked(run: Callable[[], int]) -> int:
    """Start a run in a process of its own; its number."""
    number = os.fork()
    if number == 0:
        os._exit(run())
    return number


def end_of(number: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def killed_after(run: Callable[[], int], seconds: float) -> int:
    """Kill a run after a while; how it ended."""
    number = forked(run)
    time.sleep(seconds)
    os.kill(number, signal.SIGKILL)
    return end_of(number)


def killed_at(run: Callable[[], int], point: str, save: int = 0) -> int:
    """Kill a run while it writes a file; how it ended.

    Args:
        run: the run.
        point: "torn", half of a state is written; "unreplaced", all of it, under another name; "replaced", just after;
            "policy", the policy is written under another name.
        save: which of its saves of the state.
    """

    def dies() -> int:
        torch_save, replace, saves = torch.save, os.replace, itertools.count()

        def torn(kept: Any, path: Path) -> None:
            torch_save(kept, path)
            if next(saves) == save:
                os.truncate(path, path.stat().st_size // 2)
                die()

        def around(source: Path, target: Path) -> None:
            now = target.suffix == ".toml" if point == "policy" else next(saves) == save
            if point == "replaced" and now:
                replace(source, target)
            if now:
                die()
            replace(source, target)

        if point == "torn":
            torch.save = torn
        else:
            os.replace = around
        return run()

    return end_of(forked(dies))


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process goes on")


def story(folder: Path, kills: list[Callable[[Callable[[], int]], int]]) -> dict[str, Any]:
    """A calibration that is killed so often, then runs through."""
    run, ends, states = calibration(folder), [], []
    for kill in kills:
        ends.append(kill(run))
        states.append((folder / "policy.toml.state").exists())
        if ends[-1] == 0:
            break
    else:
        ends.append(end_of(forked(run)))
        states.append((folder / "policy.toml.state").exists())
    left = sorted(path.name for path in folder.iterdir() if path.name != "policy.toml")
    return {"ends": ends, "states": states, "policy": (folder / "policy.toml").read_text(), "left": left}


def at_random(seed: int, seconds: float) -> list[Callable[[Callable[[], int]], int]]:
    """Two kills that a seed draws: at a time within the seconds that a run takes, and at a save of the state."""
    draw = random.Random(seed)
    after, point, save = draw.uniform(0.1, 0.8) * seconds, draw.choice(POINTS), draw.randrange(4)
    return [partial(killed_after, seconds=after), partial(killed_at, point=point, save=save)]


def every_story(root: Path, seeds: list[str]) -> dict[str, Any]:
    """All runs, after one that is in the way of nobody: it imports everything."""
    calibration(root / "first")()
    start = time.monotonic()
    whole = story(root / "whole", [])
    seconds = time.monotonic() - start
    runs = {seed: story(root / seed, at_random(int(seed), seconds)) for seed in seeds}
    for point in POINTS:
        runs[point] = story(root / point, [partial(killed_at, point=point, save=save) for save in (0, 5)])
    runs["policy"] = story(root / "policy", [partial(killed_at, point="policy")])
    return {"whole": whole, "runs": runs}


if __name__ == "__main__":
    folder, told = Path(sys.argv[1]), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    rules = [Rule("block_topk", params={"keep_ratio": ratio, "block_q": 16, "block_k": 16}) for ratio in RATIOS]
    Policy(rules).save(folder / "ladder.toml")
    os.write(told, json.dumps(every_story(folder, sys.argv[2:])).encode())
