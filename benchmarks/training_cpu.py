"""Time a training step of block-sparse attention, forward and backward, beside that of torch's dense attention.

    python benchmarks/training_cpu.py                     # the kernel that this machine uses
    python benchmarks/training_cpu.py --kernel gathered   # the one without a compiler

Dense and sparse take turns in one process. One row per configuration: median milliseconds, measured density, efficiency
= density * dense time / sparse time (1.0 is perfect scaling) of the whole and of the backward alone, and the relative
L2 error of the gradients of q, k and v against fp64.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = (
    "  seq  dim heads block dtype thr density | dense ms  sparse ms  efficiency | backward: dense  sparse  efficiency"
    " |      dq      dk      dv"
)


def both_ways(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """A forward and a backward."""
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def only_back(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """The backward of a forward that has run."""
    out = attend(*inputs)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def errors(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, mask: Tensor) -> list[float]:
    """Relative L2 errors of the gradients against fp64, one head at a time."""
    got = torch.autograd.grad(attend(*inputs), inputs, grad)
    wrong, whole = [0.0] * 3, [0.0] * 3
    for head in range(grad.shape[1]):
        exact_inputs = [x[:, head].detach().double().requires_grad_() for x in inputs]
        dense = torch.nn.functional.scaled_dot_product_attention(*exact_inputs, attn_mask=mask[:, head])
        for i, exact in enumerate(torch.autograd.grad(dense, exact_inputs, grad[:, head].double())):
            wrong[i] += float((got[i][:, head].double() - exact).square().sum())
            whole[i] += float(exact.square().sum())
    return [(a / b) ** 0.5 for a, b in zip(wrong, whole, strict=True)]


def measure(args: argparse.Namespace, density: float, block: int, dtype: str) -> str:
    """The table row of one configuration."""
    from block_sparse import DTYPES, interleaved, random_lists

    torch.manual_seed(0)
    shape = 1, args.heads, args.seq, args.dim
    inputs = [torch.randn(shape).to(DTYPES[dtype]).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape).to(DTYPES[dtype])
    lists = random_lists(args.heads, args.seq, block, density)

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.sparseattn.block_sparse_attention(
            q, k, v, lists.index, lists.count, block_q=block, block_k=block, provider="cpu"
        )[0]
        return out

    dense = torch.nn.functional.scaled_dot_product_attention
    steps = interleaved(both_ways(dense, inputs, grad), both_ways(sparse, inputs, grad), args.repeats)
    backs = interleaved(only_back(dense, inputs, grad), only_back(sparse, inputs, grad), args.repeats)
    setting = (
        f"{args.seq:5d} {args.dim:4d} {args.heads:5d} {block:5d} {dtype:>5} {args.threads:3d} {lists.density:7.4f}"
    )
    whole = f"{steps[0]:8.1f}  {steps[1]:9.1f}  {lists.density * steps[0] / steps[1]:10.2f}"
    back = f"{backs[0]:15.1f}  {backs[1]:6.1f}  {lists.density * backs[0] / backs[1]:10.2f}"
    wrong = " ".join(f"{error:.1e}" for error in errors(sparse, inputs, grad, lists.token_mask()))
    return f"{setting} | {whole} | {back} | {wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--density", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--block", type=int, nargs="+", default=[64])
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernel", choices=("auto", "gathered"), default="auto")
    args = parser.parse_args()
    os.environ["SPARSEATTN_CPU_KERNEL"] = "0" if args.kernel == "gathered" else "1"
    import sparseattn

    torch.set_num_threads(args.threads)
    served = next(p for p in sparseattn.backends()["block_sparse"].providers if p.name == "cpu").detail
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {served()()}\n{COLUMNS}")
    for density, block, dtype in itertools.product(args.density, args.block, args.dtype):
        print(measure(args, density, block, dtype), flush=True)


if __name__ == "__main__":
    main()
