"""Time an attention layer in onnxruntime on CPU: sparse, and the same layer exported dense.

    python benchmarks/onnx_cpu.py

The models take turns in one process; one thread is timed in its own CPU time, which other jobs disturb less. One row
per model: median milliseconds, how many times faster than dense with the operator Attention, the highest memory of a
fresh process that loads and runs it, what of that the run took beyond the loaded model, and the relative L2 error
against the same layer in PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = (
    "  seq  dim heads model                     density |       ms  times faster | peak MiB  of the run |    error"
)
DENSE = "dense, Attention"


def build(name: str, args: argparse.Namespace, dim: int) -> tuple[Any, float]:
    """The layer with this attention, and the fraction of the scores that it computes."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from block_sparse import random_lists

    torch.manual_seed(0)
    lists = random_lists(args.heads, args.seq, args.block, args.density)
    sizes = {"block_q": args.block, "block_k": args.block}

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(args.heads * dim, 3 * args.heads * dim)
            self.out = torch.nn.Linear(args.heads * dim, args.heads * dim)
            self.register_buffer("index", lists.index)
            self.register_buffer("count", lists.count)

        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if name == "block_sparse_attention":
                return torch.ops.sparseattn.block_sparse_attention(q, k, v, self.index, self.count, **sizes)[0]
            if name == "block_topk_attention":
                return torch.ops.sparseattn.block_topk_attention(q, k, v, keep_ratio=args.density, **sizes)[0]
            return scaled_dot_product_attention(q, k, v)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, args.heads, dim)).permute(2, 0, 3, 1, 4)
            return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    density = 1.0 if name.startswith("dense") else lists.density
    return Layer().eval(), density


def export(name: str, args: argparse.Namespace, dim: int, folder: Path) -> dict[str, Any]:
    """Export one model; its file, density and what PyTorch computes."""
    import torch

    import sparseattn

    layer, density = build(name, args, dim)
    torch.manual_seed(1)
    x = torch.randn(1, args.seq, args.heads * dim)
    path = folder / f"{name.replace(' ', '_').replace(',', '')}.onnx"
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        sparseattn.export.onnx(program, path, opset=20 if name == "dense, opset 20" else 23)
        return {"path": str(path), "density": density, "x": x.numpy(), "expected": layer(x).numpy()}


def session(path: str, threads: int) -> Any:
    """An onnxruntime session on CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def peak(path: str, shape: list[int], threads: int) -> dict[str, float]:
    """MiB of this process at its highest, and how far that is above the loaded model; call it in a fresh one."""
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    model = session(path, threads)
    loaded = resident("VmRSS")
    model.run(None, {model.get_inputs()[0].name: x})
    return {"peak": resident("VmHWM"), "run": resident("VmHWM") - loaded}


def resident(field: str) -> float:
    """MiB of this process now (VmRSS) or at its highest (VmHWM); getrusage would tell its parent's, if that is more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(args: argparse.Namespace, dim: int) -> None:
    """Print the rows of one head_dim."""
    names = [DENSE, "dense, opset 20", "block_sparse_attention", "block_topk_attention"]
    with tempfile.TemporaryDirectory() as folder:
        models = {name: export(name, args, dim, Path(folder)) for name in names}
        runs, errors = {}, {}
        for name, model in models.items():
            loaded = session(model["path"], args.threads)
            feed = {loaded.get_inputs()[0].name: model["x"]}
            runs[name] = lambda loaded=loaded, feed=feed: loaded.run(None, feed)[0]
            got = runs[name]()
            errors[name] = np.linalg.norm(got - model["expected"]) / np.linalg.norm(model["expected"])
        times: dict[str, list[float]] = {name: [] for name in names}
        clock = time.thread_time if args.threads == 1 else time.perf_counter
        for _, name in itertools.product(range(args.repeats), names):
            start = clock()
            runs[name]()
            times[name].append(1e3 * (clock() - start))
        median = {name: statistics.median(taken) for name, taken in times.items()}
        for name, model in models.items():
            command = [sys.executable, __file__, "--peak", model["path"], *map(str, model["x"].shape)]
            printed = subprocess.run(
                [*command, "--threads", str(args.threads)], check=True, capture_output=True, text=True
            )
            memory = json.loads(printed.stdout)
            print(
                f"{args.seq:5d} {dim:4d} {args.heads:5d} {name:25} {model['density']:7.4f} | {median[name]:8.1f}  "
                f"{median[DENSE] / median[name]:12.2f} | {memory['peak']:8.0f}  {memory['run']:10.0f} | "
                f"{errors[name]:.1e}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.peak[0], [int(size) for size in args.peak[1:]], args.threads)))
        return
    import onnxruntime
    import torch

    torch.set_num_threads(args.threads)
    print(f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, {args.threads} threads, fp32\n{COLUMNS}")
    for dim in args.dim:
        measure(args, dim)


if __name__ == "__main__":
    main()
