"""The example runs as it is documented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "context_parallel.py"


def test_two_processes() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, EXAMPLE], capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "sent by each rank in 2 collectives around 1 of 2 sites" in done.stdout
    assert "2 ranks: output differs by " in done.stdout
    numbers = done.stdout.rpartition("differs by ")[2].split(", gradients by ")
    assert all(float(number) <= 1e-5 for number in numbers)
