"""Time block-sparse attention beside torch's dense attention: dense, sparse, dense, sparse, ... in one process.

One row per configuration: median milliseconds, measured density, efficiency = density * dense time / sparse time
(1.0 is perfect scaling), executed GFLOP/s, and in the same row the error of out and lse against fp64. With one thread
the clock is the thread's CPU time, which other jobs on the machine disturb little; with more it is wall time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparseattn.attn_ops.blocks.block_index import BlockIndex
from sparseattn.attn_ops.reference.block_sparse import block_sparse_attention as reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = "  seq  dim heads block dtype thr | dense ms  sparse ms  density  efficiency  GFLOP/s | out relL1   lse max"


def interleaved(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds of two functions that take turns, after one warm-up each."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: tuple[list[float], list[float]] = ([], [])
    for repeat, which in itertools.product(range(repeats + 1), (0, 1)):
        start = clock()
        (first, second)[which]()
        if repeat:
            times[which].append(1e3 * (clock() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def random_lists(heads: int, seq: int, block: int, density: float) -> BlockIndex:
    """For every head and block of queries the same number of key blocks, drawn at random."""
    blocks = -(-seq // block)
    keep = max(1, round(density * blocks))
    chosen = torch.rand(1, heads, blocks, blocks).topk(keep).indices
    mask = torch.zeros(1, heads, blocks, blocks, dtype=torch.bool).scatter_(-1, chosen, True)
    return BlockIndex.from_mask(mask, block_q=block, block_k=block, seq_q=seq, seq_k=seq)


def error(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, lists: BlockIndex) -> tuple[float, float]:
    """Relative L1 error of out and largest error of lse against fp64, over all heads, a few query blocks at a time."""
    total, wrong, worst = 0.0, 0.0, 0.0
    sizes = {"block_q": lists.block_q, "block_k": lists.block_k, "causal": False, "scale": q.shape[3] ** -0.5}
    for head, start in itertools.product(range(q.shape[1]), range(0, lists.nq, 8)):
        rows = slice(start * lists.block_q, min(start + 8, lists.nq) * lists.block_q)
        index, count = (x[:, head : head + 1, start : start + 8] for x in (lists.index, lists.count))
        inputs = (x.double() for x in (q[:, head : head + 1, rows], k[:, head : head + 1], v[:, head : head + 1]))
        exact, exact_lse = reference(*inputs, index, count, None, **sizes)
        wrong += float((out[:, head : head + 1, rows].double() - exact).abs().sum())
        total += float(exact.abs().sum())
        worst = max(worst, float((lse[:, head : head + 1, rows] - exact_lse).abs().max()))
    return wrong / total, worst


def measure(args: argparse.Namespace, density: float, block: int, dtype: str) -> str:
    """The table row of one configuration."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, args.heads, args.seq, args.dim).to(DTYPES[dtype]) for _ in range(3))
    lists = random_lists(args.heads, args.seq, block, density)

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def sparse() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.sparseattn.block_sparse_attention(
            q, k, v, lists.index, lists.count, block_q=block, block_k=block, provider=args.provider
        )
        return result

    dense_ms, sparse_ms = interleaved(dense, sparse, args.repeats)
    out_error, lse_error = error(*sparse(), q, k, v, lists)
    gflops = 4 * lists.density * args.heads * args.seq**2 * args.dim / sparse_ms / 1e6
    setting = f"{args.seq:5d} {args.dim:4d} {args.heads:5d} {block:5d} {dtype:>5} {args.threads:3d}"
    speed = f"{dense_ms:8.2f}  {sparse_ms:9.2f}  {lists.density:7.4f}  {lists.density * dense_ms / sparse_ms:10.2f}"
    return f"{setting} | {speed}  {gflops:7.1f} | {out_error:.2e}  {lse_error:.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--density", type=float, nargs="+", default=[0.25])
    parser.add_argument("--block", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--provider", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, provider {args.provider}\n{COLUMNS}")
    for density, block, dtype in itertools.product(args.density, args.block, args.dtype):
        print(measure(args, density, block, dtype), flush=True)


if __name__ == "__main__":
    main()
