"""What our kernels take on a GPU: first whether they are right, then the headline workloads, then other sizes.

The seconds of all cases together stay below nine minutes.
"""

from . import block_sparse, correctness, sage, sla, sweep

CASES = tuple(module.CASE for module in (correctness, block_sparse, sla, sage, sweep))
