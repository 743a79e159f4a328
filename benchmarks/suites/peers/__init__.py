"""Other people's kernels on the headline workloads, beside ours and dense attention; each is optional.

A package that is not installed, or does not run, gets a row that says so. What is timed is what its own benchmark
times: for lists of blocks the kernel alone, for methods selection and quantization too.
"""

from . import block_sparse, sage, sla, sta

CASES = tuple(module.CASE for module in (block_sparse, sla, sage, sta))
