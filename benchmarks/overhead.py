"""Time one eager call on tiny tensors, where the arithmetic is free: what an op costs before it computes anything.

Dense attention, flash_attention and block_sparse_attention take turns in one process; microseconds per call, median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

import sparseattn  # noqa: F401  (registers the ops)
from sparseattn.attn_ops.blocks.block_index import BlockIndex

SHAPES = ((1, 2, 64, 32), (1, 2, 128, 32), (1, 4, 256, 64))
BLOCK = 32


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int, loops: int) -> dict[str, float]:
    """Median microseconds per call of functions that take turns, `loops` calls at a time, after one warm-up turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(loops):
                call()
            if repeat:
                times[name].append(1e6 * (time.thread_time() - start) / loops)
    return {name: statistics.median(values) for name, values in times.items()}


def calls(shape: tuple[int, int, int, int], density: float) -> dict[str, Callable[[], object]]:
    """The three attentions on q, k, v of one shape; half of the blocks, ragged, with and without a causal edge."""
    q, k, v = (torch.randn(shape) for _ in range(3))
    blocks = shape[2] // BLOCK
    mask = torch.rand(1, shape[1], blocks, blocks) < density
    mask[..., 0] = True
    lists = BlockIndex.from_mask(mask, block_q=BLOCK, block_k=BLOCK)
    ops = torch.ops.sparseattn

    def sparse(causal: bool) -> Callable[[], object]:
        return lambda: ops.block_sparse_attention(
            q, k, v, lists.index, lists.count, block_q=BLOCK, block_k=BLOCK, causal=causal
        )

    return {
        "dense": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "flash_attention": lambda: ops.flash_attention(q, k, v),
        "block_sparse": sparse(causal=False),
        "block_sparse causal": sparse(causal=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--loops", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, us per call")
    for shape in SHAPES:
        timed = interleaved(calls(shape, args.density), args.repeats, args.loops)
        print(f"{shape!s:18} " + "  ".join(f"{name} {value:.1f}" for name, value in timed.items()), flush=True)


if __name__ == "__main__":
    main()
