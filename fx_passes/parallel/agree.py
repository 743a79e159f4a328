"""The ranks compare what they are about to exchange, while they compile: a collective that differs hangs or aborts.

Costs nothing when a model runs. What was compared once is not compared again: a rank that compiles a graph a second
time, for a reason of its own, does not wait for others.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ...attn_ops.errors import ParallelError
from ...lowering.context_parallel import ContextParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..report import Report


def agree(parallel: ContextParallel, report: Report) -> None:
    """Wait until every rank of the mesh has compiled the same exchanges.

    Raises:
        ParallelError: if one has others.
        RuntimeError: by torch.distributed, if one does not come within the time-out of its group, or died.
    """
    told = [(f"{row.name} ({row.call})", row.communication) for row in report.rows]
    if moved := tuple(f"{site} by {how.method}" for site, how in told if how and how.collectives):
        _compare(tuple(parallel.mesh.get_all_groups()), parallel.rank, moved)


@functools.lru_cache(maxsize=1024)
def _compare(groups: tuple[ProcessGroup, ...], own: int, ours: tuple[str, ...]) -> None:
    import torch.distributed as dist

    every = [ours]
    for group in reversed(groups):  # after the last one, along the first dimension, all ranks have those of all
        found: list[list[tuple[str, ...]]] = [[]] * group.size()
        dist.all_gather_object(found, every, group=group)
        every = [one for several in found for one in several]
    for rank, theirs in enumerate(every):
        if theirs != ours:
            pairs = zip((*ours, "nothing"), (*theirs, "nothing"), strict=False)
            mine, other = next((one, two) for one, two in pairs if one != two)
            raise ParallelError(
                f"parallel: every rank must exchange the same, rank {own} has {mine} where rank {rank} has "
                f"{other}. Give all ranks inputs of the same shapes."
            )
