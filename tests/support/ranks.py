"""Processes that are the ranks of one group: one Python imports everything, then forks them.

    found = run("support.sharded_cases", ranks=3)      # {case: [what rank 0 returned, ...]}

Run as a program, it is that Python. A rank that dies, or that is not done in time, ends all of them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
TIMEOUT = 400
"""Seconds for all cases of one group, on a machine that does much else."""
FRESH_GRAPHS = {
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
"""Every rank compiles its graphs; the C++ that they have in common is compiled once, by the rank that needs it."""


def run(module: str, ranks: int, cases: str = "CASES", timeout: float = TIMEOUT) -> dict[str, list[Any]]:
    """What every case of a test module returns on every rank that came to its end: {"case": [of rank 0, ...]}.

    Args:
        module: "support.sharded_cases", a module that has a dictionary of functions (rank, ranks) -> JSON value.
        ranks: processes of the group.
        cases: name of the dictionary.
        timeout: seconds after which all are ended, and the test fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, module, cases, str(ranks), folder, str(timeout)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **FRESH_GRAPHS}
        done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-6000:]
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return {case: [of[case] for of in found] for case in found[0]}


def _fork(work: Callable[[int], None], ranks: int, timeout: float) -> int:
    """Run the ranks; the first exit code that is not 0, else 0. A rank that outlives `timeout` is killed."""
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if not child:
            try:
                work(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children[child] = rank
    end, worst = time.monotonic() + timeout, 0
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            children.pop(done)
            worst = worst or os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end or worst:  # what one rank did not survive, the others would wait for
            for child in children:
                os.kill(child, signal.SIGKILL)
            sys.stderr.write(f"ranks {sorted(children.values())} did not come to their end\n")
            return 1
        else:
            time.sleep(0.05)
    return worst


def main(module: str, cases: str, ranks: int, folder: str, timeout: float) -> int:
    """The Python that forks."""
    import torch
    import torch.distributed as dist

    functions: dict[str, Callable[[int, int], Any]] = getattr(importlib.import_module(module), cases)
    torch.set_num_threads(1)
    torch.compile(torch.sin, backend="aot_eager")(torch.zeros(1))  # what compiling imports, for all ranks
    gc.collect()
    gc.freeze()  # what the ranks share is not looked through, and so copied, by each

    def work(rank: int) -> None:
        store = dist.FileStore(f"{folder}/store", ranks)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout / 2)
        )
        found = {}
        for name, function in functions.items():
            sys.stderr.write(f"rank {rank}: {name}\n")  # shown if it does not come to its end
            torch.manual_seed(0)
            torch._dynamo.reset()
            found[name] = function(rank, ranks)
        Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.destroy_process_group()

    return _fork(work, ranks, timeout)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], float(sys.argv[5])))
