"""The largest difference of an entry between one process and ranks that share a sequence, results and gradients.

PYTHONPATH=tests python -m support.sharded_differences        # the table of docs/parallel.md; minutes
"""

from __future__ import annotations

import sys

from support.ranks import run
from support.sharded_cases import EVERY_MODEL, OPS

RANKS = (1, 2, 3, 4)
EVERY = {**{f"ops {name}": case for name, case in OPS.items()}, **EVERY_MODEL}


def main() -> None:
    """Print the table, a line as soon as it is known."""
    sys.stdout.write(f"| ranks | {' | '.join(EVERY)} |\n| --- |{' ---: |' * len(EVERY)}\n")
    for ranks in RANKS:
        found = run("support.sharded_differences", ranks, "EVERY", timeout=900)
        cells = [max(max(rank.values()) for rank in of) for of in found.values()]
        sys.stdout.write(f"| {ranks} | {' | '.join(f'{cell:.1e}' for cell in cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
