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
    moved = [row for row in report.rows if row.communication and row.communication.collectives]
    if moved:
        _compare(parallel.mesh.get_group(), tuple(f"{row.name} ({row.call})" for row in moved))


@functools.lru_cache(maxsize=1024)
def _compare(group: ProcessGroup, ours: tuple[str, ...]) -> None:
    import torch.distributed as dist

    found: list[tuple[str, ...]] = [()] * group.size()
    dist.all_gather_object(found, ours, group=group)
    for rank, theirs in enumerate(found):
        if theirs != ours:
            pairs = zip((*ours, "nothing"), (*theirs, "nothing"), strict=False)
            mine, other = next((one, two) for one, two in pairs if one != two)
            raise ParallelError(
                f"parallel: every rank must exchange the same, rank {group.rank()} has {mine} where rank {rank} has "
                f"{other}. Give all ranks inputs of the same shapes."
            )
